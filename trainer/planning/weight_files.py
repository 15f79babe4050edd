"""Whether the files of a model's weights are there and whole, by their headers alone. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path

INDEX = "model.safetensors.index.json"


def damage(folder: Path) -> str | None:
    """What is wrong with the safetensors files that a model would be loaded from; None: nothing, or there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        index: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    except FileNotFoundError:
        index = {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / INDEX} cannot be read: {error}"
    names = sorted(set(index.values())) or ["model.safetensors"] * (folder / "model.safetensors").exists()
    tensors: dict[str, str] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="numpy") as file:  # holds the header against the file's length
                tensors |= dict.fromkeys(file.keys(), name)
        except FileNotFoundError:
            return f"{folder} lacks weights of {name}"
        except (SafetensorError, OSError) as error:
            return f"{folder / name} is not whole: {error}"
    missing = sorted({file for name, file in index.items() if tensors.get(name) != file})
    return f"{folder} lacks weights of {', '.join(missing)}" if missing else None
