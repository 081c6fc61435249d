import ast
import math
import pathlib
import re

import jaxrl_stable
from jaxrl_stable import report
from jaxrl_stable.report.curves import MORE_PANELS, PAPER_PANELS
from jaxrl_stable.report.explanations import METRICS, interval_names
from jaxrl_stable.report.run import LAYER
from jaxrl_stable.run import writer as metrics

PACKAGE = pathlib.Path(jaxrl_stable.__file__).parent
# In the code but not in the rows: `finalize` turns it into violations.
INTERNAL = {"experts/load"}


def recorded_names(groups):
    """Returns metric names of these groups (`group/metric`) in the code that records them."""
    names = {"loss", "entropy"}
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "report") or path.name == "metrics.py":
            continue  # they name metrics that others record
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(rf"({'|'.join(groups)})/[a-z0-9_]+", node.value):
                    names.add(node.value)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "clock":
                names.add(f"time/{node.args[0].value}")
    return {f"{n}{LAYER}" if n.endswith("_layer_") else n for n in names} - INTERNAL


def test_names_are_those_that_are_recorded():
    explained = [metric.name for metric in METRICS]
    assert len(explained) == len(set(explained))
    recorded = recorded_names({name.split("/")[0] for name in explained if "/" in name})
    intervals = {end for name in recorded for end in interval_names(name)}
    missing = recorded - intervals - set(explained)
    assert not missing, f"explain these in report/explanations.py: {missing}"
    stale = set(explained) - recorded
    assert not stale, f"nothing writes these any more: {stale}"
    drawn = {name for panel in PAPER_PANELS + MORE_PANELS for name in panel.lines}
    assert drawn <= set(explained)


def test_values_outside_the_healthy_range_are_flagged(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        writer.write(1, {"weight/ess": 0.9, "mismatch/kl_k3_token_mean": 0.4, "entropy": math.nan})
    text = report.write_report(tmp_path).read_text()
    verdicts = dict(
        re.findall(r"<code>([^<]*)</code></td><td[^>]*>[^<]*</td><td><b[^>]*>(\w+)", text)
    )
    assert verdicts == {"weight/ess": "ok", "mismatch/kl_k3_token_mean": "look"}
    assert '<code>entropy</code></td><td class="n">not finite' in text


def test_layers_take_one_row_and_scores_show_their_interval(written):
    _, text = written
    watch = text.split("What to watch")[1].split("More curves")[0]
    assert watch.count("agreement_layer_") == 1
    score = report.read_run(written[0].parent).last("eval/avg_at_k")
    interval = f"{score:.3g}<br><small>{score - 0.05:.3g} to {score + 0.05:.3g}</small>"
    assert interval in watch


def test_other_metrics_are_listed_below(written):
    _, text = written
    other = text.split("Other metrics")[1]
    names = re.findall(r"<code>(.*?)</code>", other)
    assert "something/new" in names
    assert names == sorted(names)
    assert not {"eval/avg_at_k", "eval/avg_at_k_low", "routing/agreement_layer_03"} & set(names)
    assert "Seconds for sampling." in other
