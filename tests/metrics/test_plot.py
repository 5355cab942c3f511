"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.metrics.log import MetricsLogger
from megasparse.metrics.plot import plot_loss, smooth
from tests.metrics.runs import recipe, record


def test_plot(tmp_path: Path):
    record(tmp_path, 1, 20)
    picture = plot_loss(tmp_path).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_plot_without_experts_validation_or_steps(tmp_path: Path):
    with pytest.raises(ValueError, match="no step to plot"):
        plot_loss(tmp_path)
    log = MetricsLogger(tmp_path, recipe())
    log.log(1, {"loss": 2.0}, {})
    assert plot_loss(tmp_path).exists()


def test_smoothing_keeps_a_line_and_the_ends():
    line = [float(i) for i in range(200)]
    assert smooth(line) == pytest.approx(line)
    assert smooth([3.0]) == [3.0]
