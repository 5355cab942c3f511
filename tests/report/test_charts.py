"""Charts: what thinning keeps, where a line runs, what a heat map's pixels are."""

from __future__ import annotations

import base64
import io
import math
import random
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from megasparse.report import charts


def test_thinning_keeps_every_stretch_s_extremes():
    draw = random.Random(0)
    steps, values = list(range(1, 10_001)), [draw.gauss(0, 1) for _ in range(10_000)]
    thin_steps, thin_values = charts.thin((steps, values), 100)
    assert len(thin_steps) <= 100
    assert list(thin_steps) == sorted(set(thin_steps))
    assert all(values[step - 1] == value for step, value in zip(thin_steps, thin_values, strict=True))
    for start in range(0, 10_000, 200):  # 50 stretches of 200
        kept = [value for step, value in zip(thin_steps, thin_values, strict=True) if start < step <= start + 200]
        assert (min(kept), max(kept)) == (min(values[start : start + 200]), max(values[start : start + 200]))


def test_a_short_line_is_not_thinned():
    points = ([1, 2, 3], [1.0, 5.0, 2.0])
    assert charts.thin(points, 3) == points


def line(svg: str, variable: str) -> np.ndarray:
    """Corners [n, 2] of the line drawn in that colour; y points down."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*?style="[^"]*stroke: ([^;"]*)', svg)
    (path,) = [d for d, color in paths if color == variable and d.count("L") > 3]
    return np.array([[float(number) for number in corner.split()] for corner in re.findall(r"[ML] ([^\n]*)", path)])


def test_a_line_runs_where_its_values_are():
    values = [3.0, 2.0, 2.5, 1.0, 1.5, 4.0]
    corners = line(charts.line_chart("t", ([10, 11, 12, 13, 14, 20], values), (1, 30), bottom=0.0), "var(--faint)")
    across = (corners[:, 0] - corners[0, 0]) / (corners[-1, 0] - corners[0, 0])
    assert across == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 1.0], abs=1e-3)
    up = (corners[:, 1] - corners[0, 1]) / (corners[1, 1] - corners[0, 1])  # in units of the first fall, which is 1
    assert up == pytest.approx([3.0 - value for value in values], abs=1e-3)


def test_a_spike_of_one_step_in_a_long_run_is_drawn():
    values = [1.0] * 100_000
    values[70_000] = 9.0
    corners = line(charts.line_chart("t", (list(range(1, 100_001)), values), (1, 100_000)), "var(--faint)")
    top = corners[corners[:, 1].argmin()]
    left, right = corners[:, 0].min(), corners[:, 0].max()
    assert (top[0] - left) / (right - left) == pytest.approx(0.7, abs=0.002)


def image(svg: str) -> np.ndarray:
    data, _ = re.findall(r'xlink:href="data:image/png;base64,([^"]*)"', svg)  # the other is the colour bar
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def test_a_heat_map_has_a_pixel_for_each_layer_and_step():
    loads = [[1.0, 2.0], [3.0, 1.0], [1.5, 4.0]]  # of three steps, two layers
    pixels = image(charts.heat_map("t", [1, 2, 3], loads, [1, 3], (1, 3)))
    assert pixels.shape == (2, 3, 3)
    greatest = float(np.quantile(np.array(loads), 0.99))
    viridis = matplotlib.colormaps["viridis"]
    for step in range(3):
        for layer in range(2):
            share = min(1.0, (loads[step][layer] - 1) / (greatest - 1))
            expected = [round(255 * part) for part in viridis(share)[:3]]
            assert pixels[layer, step] == pytest.approx(expected, abs=3)


def test_a_long_run_s_heat_map_shows_the_largest_of_a_column():
    loads = [[1.0] for _ in range(10_000)]
    loads[5_010] = [50.0]
    pixels = image(charts.heat_map("t", list(range(1, 10_001)), loads, [0], (1, 10_000))).astype(int)
    assert pixels.shape[1] <= charts.HEAT_COLUMNS
    brightest = pixels.sum(-1)[0].argmax()
    assert brightest == math.floor(5_010 / 25)


def test_colours_are_the_pages():
    marks = charts.Marks(faults=[(2, 1), (2, 2), (3, 3)], skipped=[2], launches=[2, 3])
    svg = charts.loss_chart(([1, 2, 3], [3.0, 2.0, 1.0]), ([2, 3], [2.5, 1.5]), marks, (1, 3))
    for variable in ("ink", "grid", "series", "faint", "validation", "fault"):
        assert f"var(--{variable})" in svg
    assert not re.search(r"(fill|stroke): #(?!ffffff)", svg)
    assert ">1, 2</text>" in svg  # two faults of one step
    assert svg.count(">resumed</text>") == svg.count(">fault</text>") == svg.count(">skipped</text>") == 1


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-9, 1e9], [5.0, 5.0], [1e-3, 2e-3]])
def test_any_values_can_be_drawn(values: list[float]):
    for log in (False, True):
        assert "<path" in charts.line_chart("t", ([1, 2], values), (1, 2), log=log, bottom=0.0)
    assert "<path" in charts.line_chart("t", ([1], values[:1]), (1, 1), percent=True)
