import math
import re

import numpy as np
import pytest

from jaxrl_stable import report
from jaxrl_stable.run import writer as metrics


@pytest.mark.fast
def test_series_merge_rows_and_use_gradient_steps(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        writer.write(0, {"eval/avg_at_k": 0.1, "gradient_steps": 0})
        for step in range(1, 5):
            writer.write(step, {"x": step if step != 2 else math.nan, "gradient_steps": 8 * step})
        writer.write(4, {"eval/avg_at_k": 0.2, "x": -4})
    run = report.read_run(tmp_path)
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4]
    x, y = run.series("x")
    np.testing.assert_array_equal(x, [8, 16, 24, 32])
    np.testing.assert_array_equal(y, [1, np.nan, 3, -4])
    np.testing.assert_array_equal(run.series("eval/avg_at_k")[0], [0, 32])


@pytest.mark.fast
def test_layers_stand_in_for_xx_in_order(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        writer.write(1, {f"a/layer_{i:02d}": i for i in (100, 99, 0)} | {"a/layer_mean": 5.0})
    run = report.read_run(tmp_path)
    assert run.layers("a/layer_XX") == ["a/layer_00", "a/layer_99", "a/layer_100"]
    assert run.layers("a/layer_mean") == ["a/layer_mean"]
    assert run.layers("a/layer") == [], "names are exact"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not a directory"),
        ({}, "metrics.jsonl: missing or empty"),
        ({"metrics.jsonl": ""}, "metrics.jsonl: missing or empty"),
        ({"metrics.jsonl": '{"step": 1}\n[]\n{"step": 2}\n'}, "metrics.jsonl, line 2"),
        ({"metrics.jsonl": '{"loss": 1}\n'}, "a row has no step"),
        ({"metrics.jsonl": '{"step": 1}\n', "summary.json": "[1]"}, "summary.json: not a JSON"),
    ],
)
def test_errors_are_one_line(tmp_path, files, message):
    workdir = tmp_path / "run"
    if files is not None:
        workdir.mkdir()
        for name, content in files.items():
            (workdir / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        report.write_report(workdir)
    assert "\n" not in str(error.value)
