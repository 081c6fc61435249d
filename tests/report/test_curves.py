import re

import numpy as np
import pytest

from jaxrl_stable import report
from jaxrl_stable.report.curves import MORE_PANELS, PAPER_PANELS, draw
from jaxrl_stable.report.drawing import MAX_POINTS, thin, tick, tick_log
from jaxrl_stable.run import writer as metrics
from jaxrl_stable.statistics import smooth

PANELS = [panel for panel in PAPER_PANELS + MORE_PANELS if panel.name != "cold_start"]


def test_plots_are_made_and_every_reference_inside_them_resolves(written):
    path, text = written
    names = {p.stem for p in (path.parent / "plots").glob("*.png")}
    assert names == {panel.name for panel in PANELS}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (path.parent / "plots").glob("*.png"))
    figures = text.split("<figure>")[1:]
    titles = [re.search(r'aria-label="([^"]*)"', figure)[1] for figure in figures]
    assert titles == [panel.title for panel in PANELS], "the paper's four come first"
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= set(ids)


def test_a_cold_start_has_its_own_panel(tmp_path):
    with metrics.MetricsWriter(tmp_path, console=False) as writer:
        for step in (10, 20):
            writer.write(step, {"sft/loss": 1 / step, "sft/entropy": 2 / step, "time/step": 0.1})
    text = report.write_report(tmp_path).read_text()
    assert [p.name for p in (tmp_path / "plots").glob("*.png")] == ["cold_start.png"]
    assert 'class="grid">' not in text, "no empty grid in place of the paper's panels"


def test_layers_are_drawn_in_order_and_the_ends_named(written):
    run = report.read_run(written[0].parent)
    (panel,) = (panel for panel in PANELS if panel.style == "depth")
    svg = draw(run, panel, written[0].parent / "plots" / f"{panel.name}.png")
    assert re.findall(r">(layer \d+)<", svg) == ["layer 00", "layer 07"]


@pytest.mark.fast
def test_thin_keeps_spikes_and_smooth_keeps_constants():
    x = np.arange(50_000.0)
    y = np.sin(x / 5000)
    y[31_337], y[41_111], y[100] = 99.0, -99.0, np.nan
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= MAX_POINTS
    assert (np.nanmin(thin_y), np.nanmax(thin_y)) == (-99, 99)
    assert (thin_x[0], thin_x[-1]) == (0, 49_999)
    values = np.full(100, 0.3)
    values[50] = np.nan
    np.testing.assert_allclose(smooth(values), 0.3)
    ramp = np.arange(100.0)
    np.testing.assert_allclose(smooth(ramp)[10:-10], ramp[10:-10])


@pytest.mark.fast
def test_ticks_are_short():
    assert [tick(v, 0) for v in (0.0, 0.0005, 0.25, 12_000.0)] == ["0", "0.0005", "0.25", "12,000"]
    assert [tick_log(v, 0) for v in (1e-5, 2e-3, 0.1)] == ["1e-5", "2e-3", "0.1"]
