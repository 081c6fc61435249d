"""A reward that an untrained policy gets now and then; it depends on problem and response."""


def reward(problem, response):
    return float((len(problem["prompt"]) + sum(response.encode())) % 3 == 0)
