"""A reward that an untrained policy sometimes gets; it depends on problem and response."""


def reward(problem, response):
    return float((len(problem["prompt"]) + sum(response.encode())) % 3 == 0)
