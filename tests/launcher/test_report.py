"""`dsft report`: what it prints, and the HTML file: well formed, self-contained, whatever a run is called or says."""

from __future__ import annotations

import io
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from launcher.cli import main
from launcher.commands.eval import _show as show_scores
from launcher.goodput import Span
from launcher.html_report import render, write_report
from launcher.plots import Line, Mark, chart, thinned, ticks, timeline_chart
from launcher.report import _failures, report, show_report
from launcher.reporting import render_status, status
from trainer.rundir import RunDirectory, append_line, write_json

HOSTILE = "</title><script>alert(1)</script>\" onload='x' & \x1b[31m{{ 7*7 }}"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two attempts, the first killed by a drill; names and messages that mean harm."""
    run = RunDirectory(tmp_path / "runs" / "<script>alert(2)<")
    run.events_dir.mkdir(parents=True)
    source = {"path": HOSTILE}
    write_json(run.config_path, {"model": {"path": HOSTILE}, "data": {"train": [source]}, "training": {"max_steps": 6}})
    run.new_attempt(), run.new_attempt()
    failure = {"class": "unknown", "rank": 1, "node": HOSTILE, "step": 3, "message": HOSTILE, "action": "retry"}
    write_json(run.verdict_path(1), {"outcome": "failed", "victims": [0], **failure})
    events: list[tuple[float, str, dict[str, Any]]] = [
        (100, "launched", {"started": 99.0}),
        (100, "attempt", {"attempt": 1}),
        (110, "first_step", {"attempt": 1, "step": 1, "seconds": 1.0}),
        (111.5, "evaluation", {"attempt": 1, "step": 2, "seconds": 0.5, "loss": 2.0}),
        (112, "checkpoint", {"attempt": 1, "step": 2, "bytes": 1000, "seconds": 1.0}),
        (113.5, "drill", {"attempt": 1, "fault": "kill-rank", "step": 3}),
        (114, "failure", {"attempt": 1, **failure}),
        (115, "attempt", {"attempt": 2}),
        (120, "first_step", {"attempt": 2, "step": 3, "seconds": 1.0}),
        (124, "trained", {"attempt": 2, "step": 6}),
        (125, "finished", {"attempt": 2, "exit_code": 0}),
    ]
    for when, name, fields in events:
        append_line(run.events_dir / "supervisor.jsonl", {"time": when, "event": name, **fields})
    for when, step in ((110, 1), (111, 2), (113, 3), (120, 3), (121, 4), (122, 5), (123, 6)):
        loss = math.nan if step == 5 else 3.0 / step
        line = {"time": when, "step": step, "loss": loss, "step_seconds": 1.0, "learning_rate": 1e-4, "tokens": 50}
        append_line(run.metrics_path, line | {"target_tokens": 20, "memory_bytes": 2**30})
    append_line(run.metrics_path, {"time": 111.5, "step": 2, "evaluation": {"loss": 2.0, HOSTILE: 1.0}})
    return run


def test_numbers_that_are_not_finite_are_json_all_the_same(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    append_line(run.metrics_path, {"time": 124, "step": 7, "loss": math.nan, "step_seconds": 1.0})
    append_line(run.metrics_path, {"time": 124, "step": 7, "evaluation": {"loss": math.inf}})
    for verb in ("report", "status"):
        assert main([verb, str(run.path), "--json"]) == 0
        value = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        assert value["loss"] == "NaN"
    assert report(run)["evaluation"]["loss"] == math.inf


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_nothing(run: RunDirectory, width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    node = "gpu-node-0123.cluster.example"
    failure = dict.fromkeys(("rank", "step", "injected", "detection_seconds", "message"))
    console.print(_failures([failure | {"attempt": 12, "class": "node", "node": node, "recovery_seconds": 34567.0}]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\u2026" not in shown


def test_scores_of_many_sets_are_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    show_scores({f"evaluation-set-{i}/loss": i + 0.123456 for i in range(12)}, {})
    shown = capsys.readouterr().out
    assert all(f"evaluation-set-{i} " in shown and f"{i}.12346" in shown for i in (1, 9))


def test_the_account_of_a_drill(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    value = report(run)
    assert (value["state"], value["steps"], value["evaluation"]["loss"]) == ("finished", 6, 2.0)
    failure = value["failures"][0]
    assert (failure["injected"], failure["detection_seconds"], failure["recovery_seconds"]) == ("kill-rank", 0.5, 6.0)
    assert value["goodput"]["wall_seconds"] == 26.0
    assert value["goodput"]["seconds"]["repeated"] == 1.5  # step 3, from the evaluation on
    show_report(value)
    output = capsys.readouterr().out
    for text in ("kill-rank", "0.5 s", "6.0 s", "ETTR", "repeated", "evaluation   step 2"):
        assert text in output
    assert "\x1b" not in output
    assert "ETTR 23 %" in render_status(status(run))


class Page(HTMLParser):
    """Every tag with its attributes, and the text of the title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def test_the_html_is_well_formed_and_self_contained(run: RunDirectory) -> None:
    path = write_report(run)
    assert path == run.path / "report.html"
    text = path.read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert not {"link", "img", "iframe", "object", "base"} & set(names)
    for _, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert "src" not in attributes
        assert "href" not in attributes
    assert "url(" not in text
    assert "49" not in re.findall(r"\{\{.*?\}\}|\b49\b", text)  # no template within the template
    assert "{{ 7*7 }}" in text
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 6  # timeline, loss, score, learning rate, throughput, memory
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    marks = re.findall(r'class="mark (\w+)"', drawings[0])
    assert sorted(marks) == ["checkpoint", "drill", "evaluation", "failure"]
    assert "step 5: nan" in drawings[1]  # it is shown, not left out
    assert list(run.path.glob(".report*")) == []


def test_the_score_shown_is_the_one_that_the_run_goes_by(run: RunDirectory) -> None:
    config = json.loads(run.config_path.read_text())
    write_json(run.config_path, {**config, "evaluation": {"metric": "f1"}})
    append_line(run.metrics_path, {"time": 123, "step": 6, "evaluation": {"loss": 1.0, "exact_match": 0.5, "f1": 0.7}})
    assert "f1, by step" in render(run)


def test_a_run_that_has_done_nothing_yet(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "new")
    run.path.mkdir()
    write_json(run.config_path, {})
    assert "<svg" not in render(run)
    show_report(report(run))


def test_thinning_keeps_what_matters() -> None:
    points = [(float(x), math.sin(x / 5000)) for x in range(100_000)]
    points[70_001] = (70_001.0, 50.0)
    points[70_002] = (70_002.0, math.nan)
    kept = thinned(points)
    assert len(kept) < 4000
    assert (70_001.0, 50.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert kept == sorted(kept, key=lambda point: point[0])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.11), (3, 1e6), (-5, 5), (1e-9, 3e-9)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * high <= value <= high * (1 + 1e-9) for value in found)


@pytest.mark.parametrize(
    "points",
    [[(1.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, math.inf)], [(3.0, 1e-30), (4.0, 1e30)], [(1.0, -5.0), (2.0, 3.0)]],
)
def test_charts_of_odd_series(points: list[tuple[float, float]]) -> None:
    for from_zero in (False, True):
        drawing = chart("odd & even", [Line("a", "first", points), Line("b", "second", points, dots=True)], from_zero)
        assert bool(drawing) == any(math.isfinite(y) for _, y in points)
        if drawing:
            ElementTree.fromstring(drawing)
            assert "nan" not in drawing


def test_a_long_run_makes_a_small_file(tmp_path: Path) -> None:
    count = 20_000
    spans = [Span(float(i), i + 1.0, "evaluation" if i % 10 == 0 else "useful") for i in range(count)]
    marks = [Mark(float(i), "checkpoint", f"step {i}") for i in range(0, count, 10)]
    drawing = timeline_chart(spans, [(i, i * 10.0) for i in range(2000)], marks)
    ElementTree.fromstring(drawing)
    assert len(drawing) < 300_000
    began = time.process_time()
    line = [(float(i), float(i % 7)) for i in range(10 * count)]
    assert len(chart("long", [Line("a", "first", line)])) < 100_000
    assert time.process_time() - began < 5


def test_long_words_at_the_ends_of_an_axis_stay_within_the_drawing() -> None:
    points = [(0.0, 1.0), (1.0, 2.0)]
    drawing = chart("choices", [Line("a", "first", points)], x_text=lambda x: "a long choice" * (x in (0.0, 1.0)))
    assert re.findall(r'text-anchor="(\w+)">a long choice<', drawing) == ["middle", "end"]
    drawing = chart("choices", [Line("a", "first", points)], x_text=lambda x: "a long choice" * 3 * (x in (0.0, 1.0)))
    assert re.findall(r'text-anchor="(\w+)">a long', drawing) == ["start", "end"]
