import math
import re

from jaxrl_stable.report.samples import NO_TEXT, block, response, samples_section


def test_tokens_carry_their_figures():
    row = {
        "tokens": ["a<", "b", "c"],
        "log_weight": [math.log(1.5), None, -5.0],
        "clipped": [False, True, False],
        "differs": [0, 1, 3],
    }
    first, second, third = re.findall(r"<span.*?</span>", response(row))
    assert 'data-t="weight 1.5"' in first
    assert "--warm" in first
    assert "a&lt;" in first
    assert (
        'class="t clipped routed" style="" data-t="clipped · experts differ in 1 layer"' in second
    )
    assert "--cool),0.60" in third
    assert "experts differ in 3 layers" in third


def test_layers_that_differ_are_named_where_they_are_known():
    row = {"tokens": ["a", "b", "c"], "differs": [[0, 3], [2], []]}
    first, second, third = re.findall(r"<span.*?</span>", response(row))
    assert 'routed" style="" data-t="experts differ in layers 0, 3"' in first
    assert 'data-t="experts differ in layer 2"' in second
    assert "routed" not in third


def test_a_token_without_text_can_be_pointed_at():
    assert f">{NO_TEXT}</span>" in response({"tokens": [""], "log_weight": [0.1]})


def test_long_samples_are_cut():
    row = {"tokens": ["x"] * 10_000, "log_weight": [0.1] * 10_000}
    assert "7,000 more tokens" in response(row)
    assert "80,000 more characters" in block("y" * 100_000)


def test_the_legend_explains_what_was_recorded_only():
    text = samples_section([{"step": 1, "tokens": ["a"], "log_weight": [0.1]}])
    assert "π_old/μ" in text
    assert "Underlined" not in text
    assert "Framed" not in text
    assert 'class="soft">B' not in samples_section([{"step": 1, "response": "a"}])


def test_responses_to_one_problem_stand_together():
    rows = [{"step": 1, "prompt": p, "response": r, "answer": "A"} for p, r in ("px", "py", "qz")]
    text = samples_section(rows)
    assert text.count("<article>") == text.count("<pre>A</pre>") == 2
    assert text.count("<pre>p</pre>") == 1
    assert all(f"<pre>{response}</pre>" in text for response in "xyz")
