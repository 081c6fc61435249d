import pytest

from jaxrl_stable.rewards import Verdict, exact_reward

RIGHT, WRONG, INVALID = Verdict(1.0, "ok"), Verdict(0.0, "ok"), Verdict(0.0, "invalid")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("reference", "response", "verdict"),
    [
        ("#### Paris", "The capital ... #### paris \n", RIGHT),
        ("Paris", r"It is \boxed{Paris}", RIGHT),
        ("1 2\n3 4", " 1  2\n3 4\n", RIGHT),
        ("Straße", "STRASSE", RIGHT),
        ("Paris", "It is Paris", WRONG),
        ("Paris", "#### Paris #### Rome", WRONG),
        ("Paris", " \n", INVALID),
        ("Paris", "#### ", INVALID),
        ("Paris", "Paris" + " " * 3_000, INVALID),
        ("Paris", "Paris\n####", RIGHT),
        ("Paris", r"\boxed{Paris}" + "\n\n#### Verification\nIt is in France.", RIGHT),
        ("Paris", r"\boxed{Paris} or \boxed{Rome}", WRONG),
        ("Paris", "#### Final Answer\n\nParis", RIGHT),
        ("Paris", "x" * 10_000_000 + "#### Paris", RIGHT),
    ],
)
def test_exact(reference, response, verdict):
    assert exact_reward({"answer": reference}, response) == verdict


def test_case_may_matter():
    assert exact_reward({"answer": "Ab"}, "Ab", casefold=False) == RIGHT
    assert exact_reward({"answer": "Ab"}, "ab", casefold=False) == WRONG


def test_empty_reference():
    with pytest.raises(ValueError, match="reference answer '#### ' is empty"):
        exact_reward({"answer": "#### "}, "a")
