"""A Hugging Face folder from a checkpoint that plain DeepSpeed has written, for `model.path`: weights to start from.

    python -P -m trainer.deepspeed_import CHECKPOINT MODEL OUTPUT DTYPE [TAG]

CHECKPOINT is the folder given to `save_checkpoint` (ZeRO 1 to 3), or a universal checkpoint; MODEL a Hugging Face
folder or hub id with the model's config and tokenizer. Prints one JSON line: path, parameters, bytes.
"""

from __future__ import annotations

import math
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.engine import deepspeed_weights
from trainer.failures import UserError, run_tool
from trainer.model import DTYPES, quiet_libraries
from trainer.planning.model_facts import model_folder

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")


def import_checkpoint(checkpoint: Path, model: str, output: Path, dtype: str, tag: str | None = None) -> dict[str, Any]:
    """Write the folder and check it; it appears by one rename.

    The weights are in memory as a whole, in fp32 and in ``dtype``.

    Raises:
        UserError: no such checkpoint, it is of another model, lacks weights, or ``output`` is in use.
    """
    import transformers

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already: choose a folder that is not, or is empty")
    source = model_folder(model) or Path(model)
    if not (source / "config.json").is_file():
        raise UserError(f"--model {model}: there is no config.json; give the Hugging Face folder that was trained from")
    weights = _weights(checkpoint, tag)
    config = transformers.AutoConfig.from_pretrained(source)
    made_by = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0], None)
    if made_by is None:
        raise UserError(f"--model {model}: transformers has no {config.architectures[0]}")
    with torch.device("meta"):
        whole = made_by.from_config(config) if hasattr(made_by, "from_config") else made_by(config)
    _fill(whole, weights, DTYPES[dtype])
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*_WEIGHTS))
    whole.save_pretrained(partial)
    _check(partial, type(whole), whole.state_dict(), DTYPES[dtype])
    if output.is_dir():
        output.rmdir()
    partial.rename(output)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    return {"path": str(output), "parameters": sum(p.numel() for p in whole.parameters()), "bytes": size}


def _weights(folder: Path, tag: str | None) -> dict[str, torch.Tensor]:
    """By name; fp32."""
    if (folder / "zero").is_dir():
        return _universal(folder)
    latest = folder / ("latest_universal" if (folder / "latest_universal").is_file() else "latest")
    if tag is None and not latest.is_file():
        raise UserError(
            f"{folder}: neither a DeepSpeed checkpoint (no file `latest`) nor a universal one; or give --tag"
        )
    tag = tag or latest.read_text(encoding="utf-8").strip()
    if not (folder / tag).is_dir():
        raise UserError(f"{folder} has no checkpoint {tag}")
    if (folder / tag / "zero").is_dir():
        return _universal(folder / tag)
    try:
        return deepspeed_weights(folder, tag)
    except (OSError, ValueError, KeyError, NotImplementedError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder / tag} cannot be read: {str(error).splitlines()[0]}") from error


def _universal(folder: Path) -> dict[str, torch.Tensor]:
    """Those made of ZeRO-3 hold flat tensors, the others {"param": tensor in its shape, ...}."""
    found = {}
    for path in sorted((folder / "zero").glob("*/fp32.pt")):
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        found[path.parent.name] = content["param"] if isinstance(content, dict) else content
    return found


def _fill(model: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Make the weights those of a model on the meta device."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if tensor.dim() == 1 and tensor.numel() == math.prod(wanted.get(name, (0,))):  # see _universal
            weights[name] = tensor.view(wanted[name])
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    other = sorted(name for name in shapes if shapes[name] != wanted.get(name))
    if other:
        name = other[0]
        raise UserError(
            f"the checkpoint is of another model: {name} is {list(shapes[name])} there and "
            f"{list(wanted[name]) if name in wanted else 'not there'} in --model ({len(other)} differ)"
        )
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    missing = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise UserError(
            f"the checkpoint lacks {missing[0]} ({len(missing)} in all): DeepSpeed finds no frozen weights in "
            "universal checkpoints, where the one that it was made of may serve, nor in those of ZeRO-1"
        )


def _check(folder: Path, made_by: Any, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """What plain transformers loads is what was in the checkpoint, to the last bit."""
    found = made_by.from_pretrained(folder, dtype=dtype).state_dict()
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor):
            raise UserError(f"{folder}: {name} is not what the checkpoint holds; transformers changes it on loading")


def main() -> int:
    quiet_libraries()
    checkpoint, model, output, dtype, *tag = sys.argv[1:]
    return run_tool(lambda: import_checkpoint(Path(checkpoint), model, Path(output), dtype, *tag))


if __name__ == "__main__":
    sys.exit(main())
