"""`dsft stage`: everything a config takes from the network, copied into a folder that compute nodes reach.

    python -P -m trainer.stage CONFIG_JSON FOLDER

Prints one JSON line, {"config", "copied": [...]}. Never imports torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from trainer.config.loading import load_config, redacted
from trainer.config.schema import DataSource, LaunchConfig
from trainer.data.formats.columns import load_dataset
from trainer.data.remote import is_hub_dataset, is_remote
from trainer.data.sources import find_files
from trainer.failures import UserError, run_tool
from trainer.planning.weight_files import damage
from trainer.rundir import write_json

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Weights are read from safetensors alone; the others are copies of the same in other formats
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*"]
_TOKENIZER = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def stage(config: LaunchConfig, folder: Path) -> tuple[Path, list[str]]:
    """Copy what `config` names on the hub or by URL into `folder`; (a config that names the copies, what was copied).

    Local paths stay as they are. What a former call has copied is not copied again.

    Raises:
        UserError, DataError: something cannot be had, or is not whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copied: list[str] = []
    value = redacted(config)
    model = value["model"]
    for key in ("path", "tokenizer", "processor"):
        name = model[key]
        if name is not None and not os.path.isabs(name):
            target = folder / ("models" if key == "path" else f"{key}s") / name.replace("/", "--")
            _download(name, target, f"model.{key}", None if key == "path" else _TOKENIZER)
            model[key] = str(target)
            copied.append(name)
    if model["path"] is not None:
        verify_model(Path(model["path"]))
    for part, sources in (("train", config.data.train), ("evaluation", config.data.evaluation)):
        for index, source in enumerate(sources):
            place = folder / "data" / f"{part}-{index}"
            value["data"][part][index] |= _stage_source(source, place, copied)
    value["cluster"]["environment"] = OFFLINE | value["cluster"]["environment"]
    path = folder / "config.json"
    write_json(path, value, indent=2)
    return path, copied


def _download(name: str, target: Path, where: str, patterns: list[str] | None) -> None:
    """All files of a model of the hub, but no weights in other formats; or those that match `patterns`."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        snapshot_download(
            name, local_dir=target, allow_patterns=patterns, ignore_patterns=None if patterns else _OTHER_WEIGHTS
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}: {name} cannot be had from the hub: {reason}; is the id right, and does `hf auth login` or "
            "HF_TOKEN give access to it? A folder on shared storage needs no staging"
        ) from error
    if not any(path.is_file() for path in target.glob("*")):
        raise UserError(f"{where}: {name} has none of the files that are needed ({', '.join(patterns or ['any'])})")


def verify_model(folder: Path) -> None:
    """Raise UserError unless a model's weights are all there, whole, and need no code from elsewhere."""
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.path: there is no safetensors file in {folder}; convert the weights (`save_pretrained`)"
        )
    if found := damage(folder):
        raise UserError(f"model.path: {found}; remove it and stage again")
    settings = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    foreign = [name for name in dict(settings.get("auto_map") or {}).values() if "--" in str(name)]
    if foreign:
        raise UserError(
            f"model.path: the code of this model lies in another repository ({foreign[0]}), which cannot be staged; "
            "copy that code into the model's folder and shorten `auto_map` in its config.json"
        )


def _stage_source(source: DataSource, place: Path, copied: list[str]) -> dict[str, Any]:
    """The fields of a source that change."""
    if is_hub_dataset(source.path):
        if not place.exists():
            partial = place.with_name(f".{place.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            load_dataset(source).save_to_disk(str(partial))
            partial.rename(place)
        copied.append(source.path)
        return {"path": str(place), "subset": None}
    changed: dict[str, Any] = {}
    for key in ("source_path", "target_path") if source.format == "parallel" else ("path",):
        address: str | None = getattr(source, key)
        if address is not None and is_remote(address):
            changed[key] = _copy_files(address, place if key == "path" else place / key)
            copied.append(address)
    return changed


def _copy_files(url: str, folder: Path) -> str:
    """Copies of a URL's files, in the order of the URLs; the path or glob that stands for them."""
    found = find_files(url)
    folder.mkdir(parents=True, exist_ok=True)
    names = [Path(address.split("?", 1)[0]).name for _, address in found]
    if len(names) > 1:
        names = [f"{number:05d}-{name}" for number, name in enumerate(names)]
    for (copy, _), name in zip(found, names, strict=True):
        target = folder / name
        if not target.exists() or target.stat().st_size != copy.stat().st_size:
            partial = folder / f".{name}.partial"
            shutil.copyfile(copy, partial)
            partial.rename(target)
    return str(folder / (names[0] if len(names) == 1 else "*"))


def main() -> int:
    """Stage, and print what was done; 2 with the reason on stderr where it cannot be done."""

    def staged() -> dict[str, Any]:
        written, copied = stage(load_config(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]))
        return {"config": str(written), "copied": copied}

    return run_tool(staged)


if __name__ == "__main__":
    sys.exit(main())
