"""The page in a real browser: what is seen, in light and dark, wide and narrow, with no network and no scripts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megasparse.config import parse_recipe
from megasparse.metrics.environment import write_environment
from megasparse.metrics.record import line_of
from megasparse.parameters import parameter_count
from megasparse.report.page import PANELS, report
from tests.browser import Browser

EVIL = '<script>document.title = "evil"</script><img src="http://example.com/x.png"> & "quoted" {{ 7 * 7 }}'
RAW = {
    "name": "tiny",
    "data": {"sets": [{"path": "data/<i>tags</i>"}], "seq_length": 64},
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "moe": {"num_experts": 4, "ffn_hidden_size": 32, "layers": [0, 1, 0, 1]},
    },
    "training": {"steps": 60, "global_batch_size": 8},
}
RECIPE = parse_recipe(RAW)
TIMING = {"tokens_per_second", "mfu", "rank_spread"}
FIGURES = {panel.key for panels in PANELS.values() for panel in panels} - TIMING
LIGHT = {"page": (0xF7, 0xF8, 0xFA), "series": (0x0B, 0x5C, 0xAD), "fault": (0xC4, 0x23, 0x2B)}
DARK = {"page": (0x12, 0x15, 0x1A), "series": (0x6D, 0xB3, 0xF8), "fault": (0xFF, 0x7B, 0x80)}


def record(step: int) -> dict[str, Any]:
    timing = {"seconds": 2.0, "tokens_per_second": 256.0 + step, "mfu": 0.4, "rank_spread": 1.1}
    timing["time"] = 1_700_000_000 + 2.0 * step
    loads = [1.0 + step / 60, 3.0 - step / 60]
    entry = {"step": step, "loss": 2 + 5 / step, "tokens": 512 * step, "expert_load_by_layer": loads, "timing": timing}
    entry |= {**dict.fromkeys(FIGURES, 0.1 + 0.5 / step), "expert_load": max(loads)}
    if step % 20 == 0:
        entry["validation_loss"] = 2.1 + 5 / step
    if step == 33:
        entry |= {"loss": float("nan"), "skipped": 1}
    return entry


def fault(number: int, step: int | None, **changes: Any) -> dict[str, Any]:
    basis = {"time": "2023-11-14T22:14:00+00:00", "step": step, "kind": "hang", "rank": 1, "host": "node1"}
    return {**basis, "message": f"message {number}", **changes}


FAULTS = [
    fault(1, 20, message=EVIL),
    fault(2, 40, kind="spike", rank=None, host=None),
    fault(3, None, kind="lost", host="<b>node2</b>"),
]


def write_run(folder: Path, steps: int = 60, faults: list[dict[str, Any]] = FAULTS) -> Path:
    """A run of which everything is recorded, launched a second time before step 31."""
    write_environment(folder, RECIPE, 96)
    write_environment(folder, RECIPE, 96)
    launches = json.loads((folder / "environment.json").read_text())
    launches[0] |= {"time": "2023-11-14T22:13:20+0000", "packages": {**launches[0]["packages"], "torch": "2.12.0"}}
    launches[1] |= {"time": "2023-11-14T22:14:21+0000", "command": ["megasparse", "train", EVIL]}
    (folder / "environment.json").write_text(json.dumps(launches))
    (folder / "metrics.jsonl").write_text("".join(line_of(record(step)) for step in range(1, steps + 1)))
    (folder / "faults.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in faults))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


def pixels(browser: Browser) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))


def boxes(browser: Browser, selector: str) -> list[dict[str, Any]]:
    """Text and place of each element, in pixels of the whole page."""
    return browser.evaluate(
        f"""[...document.querySelectorAll({json.dumps(selector)})].map(e => {{
            const box = e.getBoundingClientRect();
            return {{text: e.textContent.trim(), x: box.x, y: box.y + scrollY, width: box.width, height: box.height}};
        }})"""
    )


@pytest.mark.parametrize(("scheme", "colors"), [("light", LIGHT), ("dark", DARK)])
def test_every_figure_is_seen(browser: Browser, page: Path, scheme: str, colors: dict[str, tuple[int, int, int]]):
    browser.open(page, scheme=scheme)
    assert browser.requests == [page.as_uri()]
    assert browser.complaints == []
    figures = boxes(browser, "figure")
    assert len(figures) == 2 + sum(map(len, PANELS.values()))
    picture = pixels(browser)
    assert picture[0, 0].tolist() == list(colors["page"])
    for figure in figures:
        x, y, width, height = (round(figure[key]) for key in ("x", "y", "width", "height"))
        inside = picture[y : y + height, x : x + width]
        assert min(inside.shape[:2]) > 150
        if "by MoE layer" in figure["text"]:
            assert len(np.unique(inside.reshape(-1, 3), axis=0)) > 50
        else:
            assert (inside == colors["series"]).all(-1).sum() > 100, figure["text"]
    loss = picture[round(figures[0]["y"]) : round(figures[0]["y"] + figures[0]["height"])]
    assert (loss == colors["fault"]).all(-1).sum() > 20  # thin lines, most of whose pixels are half covered


def test_faults_are_marked_at_their_steps(browser: Browser, page: Path):
    browser.open(page)
    loss = boxes(browser, "figure")[0]
    labels = [label for label in boxes(browser, "figure svg text") if label["y"] < loss["y"] + loss["height"]]
    below = [label for label in labels if label["y"] > loss["y"] + 0.85 * loss["height"]]
    centre = {label["text"]: label["x"] + label["width"] / 2 for label in below}
    pixels_a_step = (centre["60"] - centre["10"]) / 50
    above = {label["text"]: label["x"] + label["width"] / 2 for label in labels if label["y"] < loss["y"] + 25}
    places = {number: 10 + (above[number] - centre["10"]) / pixels_a_step for number in ("1", "2")}
    assert places == pytest.approx({"1": 20, "2": 40}, abs=0.5)
    assert "3" not in above  # it has no step
    assert [cell["text"] for cell in boxes(browser, "td:first-child.right")] == ["1", "2", "3"]


def test_what_users_and_machines_wrote_is_text(browser: Browser, page: Path):
    browser.open(page)
    text = browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.title").startswith("tiny")
    assert browser.evaluate("document.querySelectorAll('script, img, td b, dd i').length") == 0
    for literal in (EVIL, "<b>node2</b>", "data/<i>tags</i>"):
        assert literal in text


def test_the_page_fits_a_telephone(browser: Browser, page: Path):
    browser.open(page, width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390


def test_what_is_said(browser: Browser, page: Path):
    browser.open(page)
    text = browser.evaluate("document.body.innerText")
    total, active = parameter_count(RECIPE.model, 96, 64)
    assert f"{total:,}, of which {active:,} take part in a token" in text
    tiles = "".join(tile["text"] for tile in boxes(browser, ".tiles .card"))
    training = f"training loss{(2 + 5 / 59 + 2 + 5 / 60) / 2:.4f}mean of the last 2"
    validation = f"validation loss{2.1 + 5 / 60:.4f}at step 60"
    for tile in (
        "step60of 60",
        "tokens30.7 k30,720",
        training,
        validation,
        "time in steps2:00median 2 s a",
        "steps skipped1",
    ):
        assert tile in tiles
    cells = [cell["text"] for cell in boxes(browser, "tr:last-child td")]
    assert "31" in cells  # the second launch's first step: it began after the 30th record
    assert any("torch 2.12.0 → " in cell for cell in cells)
    for line in (page.parent / "recipe.yaml").read_text().splitlines():
        assert line.strip() in text


def test_layers_are_numbered_as_in_the_model(browser: Browser, page: Path):
    browser.open(page)
    (heat_map,) = [box["text"] for box in boxes(browser, "figure") if "by MoE layer" in box["text"]]
    numbers = heat_map.split("step")[1].split("layer")[0].split()
    assert numbers == ["1", "3"]


def test_a_run_without_steps_has_a_page(browser: Browser, tmp_path: Path):
    browser.open(report(write_run(tmp_path, steps=0, faults=[])))
    text = browser.evaluate("document.body.innerText")
    assert "No step is recorded yet." in text
    assert "None is recorded." in text
    assert browser.complaints == []


def test_a_run_that_this_version_cannot_read_has_a_page(tmp_path: Path):
    write_run(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(path.read_text().replace("num_layers:", "layer_count:"))
    assert "not counted: " in report(tmp_path).read_text()


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is no run folder, it has no recipe\.yaml"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_long_run_s_page_is_small(tmp_path: Path):
    short = len(report(write_run(tmp_path / "short", steps=1_000)).read_bytes())
    long = len(report(write_run(tmp_path / "long", steps=20_000)).read_bytes())
    assert long < 2 * short
    assert long < 2_000_000
