"""Pictures of results for README and docs: `python benchmarks/figures.py`, after a benchmark has been run again.

Each is made from a JSON file in `benchmarks/results/` alone; the tests make them anew and compare.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT

FIGURES = ROOT / "docs" / "figures"
NAMES = {
    "dsft": "dsft launch",
    "bare": "bare DeepSpeed loop",
    "hf": "HF Trainer + DeepSpeed",
    "trl": "TRL SFTTrainer, packed",
    "arctic": "ArcticTraining",
}
PANELS = {  # column of the table -> title, digits
    "target tokens/s": ("target tokens per second (more is better)", 0),
    "memory of a rank, GiB": ("memory of a rank, GiB (less is better)", 2),
    "save stall, s": ("training stalled by a save, s", 2),
    "resume, s": ("from the command to the first step after a resume, s", 1),
}
WIDTH, LABEL, BAR, ROW = 430, 165, 190, 20  # pixels: a panel, its names, its longest bar, a line
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 }
.bar { fill: #afb8c1 } .dsft { fill: #0969da }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .bar { fill: #57606a } .dsft { fill: #4493f8 } }
"""


def panel(title: str, values: dict[str, float], digits: int, x: int, y: int) -> str:
    """Horizontal bars from zero, one for each side, its value behind it."""
    longest = max(values.values())
    parts = [f'<text class="title" x="{x}" y="{y + 14}">{html.escape(title)}</text>']
    for index, (side, value) in enumerate(values.items(), start=1):
        top, long = y + index * ROW + 4, max(BAR * value / longest, 1)
        style = "dsft" if side == "dsft" else "bar"
        parts += [
            f'<text x="{x}" y="{top + 12}">{html.escape(NAMES[side])}</text>',
            f'<rect class="{style}" x="{x + LABEL}" y="{top + 2}" width="{long:.1f}" height="{ROW - 6}" rx="2"/>',
            f'<text x="{x + LABEL + long + 6:.1f}" y="{top + 12}">{value:,.{digits}f}</text>',
        ]
    return "\n".join(parts)


def peers(result: dict[str, Any]) -> str:
    """The table of `peer_runs.py`, its columns side by side, as <svg>."""
    table: dict[str, dict[str, float]] = result["table"]
    height = (len(table) + 1) * ROW + 20
    drawn = [
        panel(title, {side: row[column] for side, row in table.items()}, digits, place % 2 * WIDTH, place // 2 * height)
        for place, (column, (title, digits)) in enumerate(PANELS.items())
    ]
    size = f'viewBox="0 0 {2 * WIDTH} {2 * height}" width="{2 * WIDTH}"'
    name = "dsft beside its peers: tokens per second, memory, saves, resume"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{name}">',
            f"<title>{name}</title><style>{STYLE}</style>",
            *drawn,
            "</svg>\n",
        ]
    )


def figures() -> dict[Path, str]:
    """Text of each file."""
    return {FIGURES / "peers.svg": peers(json.loads((RESULTS / "peer_runs.json").read_text(encoding="utf-8")))}


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for path, text in figures().items():
        path.write_text(text, encoding="utf-8")
