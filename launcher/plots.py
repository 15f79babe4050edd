"""Plots as SVG text: lines over steps, and the timeline of a run. Colours are CSS classes of `report.html`."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.console import printable
from launcher.goodput import Span
from launcher.watch import duration

Point = tuple[float, float]

WIDTH, HEIGHT = 860, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 30
_BINS = 700  # about one for each pixel in width
_SECONDS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 4 * 3600, 8 * 3600, 86400)


@dataclass(frozen=True)
class Line:
    """A named series of (x, y), rising in x; y may be nan or inf. `dots`: marks instead of a line."""

    name: str
    style: str  # the CSS class
    points: Sequence[Point]
    dots: bool = False


def thinned(points: Sequence[Point], bins: int = _BINS) -> list[Point]:
    """At most about 4 points a bin of x: the first, the least, the greatest, the last, and one that is not finite."""
    if len(points) <= 4 * bins:
        return list(points)
    first, width = points[0][0], (points[-1][0] - points[0][0]) / bins
    kept: list[Point] = []
    start = 0
    for index in range(1, len(points) + 1):
        if index < len(points) and (points[index][0] - first) // width == (points[start][0] - first) // width:
            continue
        group = range(start, index)
        finite = [i for i in group if math.isfinite(points[i][1])]
        wanted = {start, index - 1, *[i for i in group if not math.isfinite(points[i][1])][:1]}
        if finite:
            wanted |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(wanted)]
        start = index
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count + 1)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str,
    lines: Sequence[Line],
    from_zero: bool = False,
    x_name: str = "step",
    x_text: Callable[[float], str] | None = None,
) -> str:
    """Lines over steps, as one <svg>; "" where there is nothing to plot. What is not finite is marked at the top.

    `x_text` writes an x that is no step; "" leaves its label out.
    """
    written = x_text or (lambda step: f"{step:.0f}" if float(step).is_integer() else "")
    lines = [Line(line.name, line.style, thinned(line.points), line.dots) for line in lines if line.points]
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not values:
        return ""
    low, high = _range(values, from_zero)
    steps = [x for line in lines for x, _ in line.points]
    first, last = _range(steps, False) if min(steps) == max(steps) else (min(steps), max(steps))

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [_open(title, HEIGHT)]
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_label(_LEFT - 8, y(value) + 4, _short(value), "end"))
    for step in ticks(first, last, 8):
        if text := written(step):
            half = 4 * len(text)  # so wide at most: a long choice at an end of the axis stays within the drawing
            anchor = "end" if x(step) + half > WIDTH else "start" if x(step) < half else "middle"
            parts.append(_label(x(step), HEIGHT - 10, text, anchor))
    parts.append(f'<path class="axis" d="M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    for line in lines:
        parts += _drawn(line, x, y, lambda step: f"{x_name} {x_text(step) if x_text else f'{step:.0f}'}")
    return "".join([*parts, "</svg>"])


def _drawn(
    line: Line, x: Callable[[float], float], y: Callable[[float], float], where: Callable[[float], str]
) -> Iterator[str]:
    finite = [(step, value) for step, value in line.points if math.isfinite(value)]
    if line.dots:
        for step, value in finite:
            text = _escape(f"{line.name}, {where(step)}: {value:.5g}")
            place = f'cx="{x(step):.1f}" cy="{y(value):.1f}"'
            yield f'<circle class="{line.style}" {place} r="4"><title>{text}</title></circle>'
    else:
        pieces: list[str] = []
        before = False
        for step, value in line.points:
            if math.isfinite(value):
                pieces.append(f"{'L' if before else 'M'}{x(step):.1f} {y(value):.1f}{'' if before else 'h0.01'}")
            before = math.isfinite(value)
        yield f'<path class="line {line.style}" d="{"".join(pieces)}"/>'
    for step, value in line.points:
        if not math.isfinite(value):
            text = _escape(f"{line.name}, {where(step)}: {value}")
            yield f'<path class="bad" d="M{x(step) - 4:.1f} {_TOP - 8}l8 8m0 -8l-8 8"><title>{text}</title></path>'


@dataclass(frozen=True)
class Mark:
    """Something that happened at a time (unix seconds): `kind` is failure, drill, checkpoint or evaluation."""

    time: float
    kind: str
    text: str


_ROWS = {"failure": 74, "drill": 74, "checkpoint": 90, "evaluation": 106}
_SHAPES: Mapping[str, str] = {  # told apart by shape as well as by colour
    "failure": "m-5 -5l10 10m0 -10l-10 10",
    "drill": "m0 -6l5 6l-5 6l-5 -6z",
    "checkpoint": "m0 -5l5 9h-10z",
    "evaluation": "m-3.5 -3.5h7v7h-7z",
}


def timeline_chart(spans: Sequence[Span], attempts: Sequence[tuple[int, float]], marks: Sequence[Mark]) -> str:
    """The run's time from left to right: its parts in colours, attempts (number, start) above, marks below."""
    if not spans:
        return ""
    begin, end = spans[0].start, spans[-1].end
    scale = (WIDTH - 2 * _RIGHT) / max(end - begin, 1e-9)

    def x(time: float) -> float:
        return _RIGHT + (min(max(time, begin), end) - begin) * scale

    parts = [_open("timeline of the run", 144)]
    for span in _coarse(spans):
        text = _escape(f"{span.part}: {duration(span.start - begin)} to {duration(span.end - begin)}")
        size = f'width="{(span.end - span.start) * scale:.2f}" height="34"'
        parts.append(
            f'<rect class="part {span.part}" x="{x(span.start):.2f}" y="26" {size}><title>{text}</title></rect>'
        )
    free = 0.0
    for number, start in attempts:
        parts.append(f'<path class="axis" d="M{x(start):.1f} 20v46"/>')
        if x(start) >= free:
            words = f"attempt {number}"
            at_end = x(start) > WIDTH - 80
            parts.append(_label(x(start), 16, words, "end" if at_end else "start"))
            free = x(start) + 7.0 * len(words)
    taken: set[tuple[str, int]] = set()
    for mark in marks:
        place = (mark.kind, round(x(mark.time) / 3))
        if mark.kind in ("checkpoint", "evaluation") and place in taken:
            continue
        taken.add(place)
        shape = f"M{x(mark.time):.1f} {_ROWS[mark.kind]}{_SHAPES[mark.kind]}"
        parts.append(f'<path class="mark {mark.kind}" d="{shape}"><title>{_escape(mark.text)}</title></path>')
    step = next((s for s in _SECONDS if (end - begin) / s <= 8), 86400 * math.ceil((end - begin) / 86400 / 8))
    for index in range(int((end - begin) / step) + 1):
        at = x(begin + index * step)
        parts.append(f'<path class="axis" d="M{at:.1f} 118v5"/>')
        anchor = "start" if index == 0 else "end" if at > WIDTH - 40 else "middle"
        parts.append(_label(at, 136, duration(index * step), anchor))
    return "".join([*parts, f'<path class="axis" d="M{_RIGHT} 118H{WIDTH - _RIGHT}"/></svg>'])


def _coarse(spans: Sequence[Span]) -> list[Span]:
    """So many spans as can be seen: where there are more, each stretch gets the part that fills most of it."""
    if len(spans) <= 2 * _BINS:
        return list(spans)
    begin, width = spans[0].start, (spans[-1].end - spans[0].start) / _BINS
    shares: list[dict[Any, float]] = [{} for _ in range(_BINS)]
    for span in spans:
        index = min(int((span.start - begin) / width), _BINS - 1)
        while index < _BINS and begin + index * width < span.end:
            inside = min(span.end, begin + (index + 1) * width) - max(span.start, begin + index * width)
            shares[index][span.part] = shares[index].get(span.part, 0.0) + inside
            index += 1
    result: list[Span] = []
    for index, share in enumerate(shares):
        part = max(share, key=lambda name: share[name])
        piece = Span(begin + index * width, begin + (index + 1) * width, part)
        joined = result and result[-1].part == part
        result[-1:] = [Span(result[-1].start, piece.end, part)] if joined else [*result[-1:], piece]
    return result


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _open(title: str, height: int) -> str:
    name = _escape(title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">'
        f"<title>{name}</title>"
    )


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escape(text)}</text>'


def _range(values: Sequence[float], from_zero: bool) -> Point:
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return (low if from_zero else low - room), high + room


def _short(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.1e}"
