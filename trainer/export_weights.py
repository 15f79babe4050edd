"""A checkpoint's weights as sharded safetensors, a chunk at a time, and the proof that they came out right.

Memory: one chunk, or one parameter where the file format of a model family splits it (transformers fuses the experts
of some families when it loads them). The safetensors layout is written here, since the library's writer wants all
tensors of a file in memory: 8 bytes of header length (little endian), the header as JSON, the tensors one by one.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from trainer.adapters import is_transposed, piece_of, plain_name
from trainer.averaging import weights_kind
from trainer.config.trained import AdapterConfig
from trainer.export_adapter import Update, name_in_folder, pieces_by_module
from trainer.failures import StorageError
from trainer.origin import elements
from trainer.parameters import Shard
from trainer.rundir import write_json
from trainer.slices import Slices

_CHUNK = 1 << 21  # elements
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# A model of this size is held in memory for the comparison of logits
_LOGITS_BYTES = 2 << 30
_TOKENS = 16


@dataclass(frozen=True)
class Entry:
    """A tensor of the export: ``name`` there, from the checkpoint's ``source``, or from a part of it (``split``)."""

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    split: bool = False

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Weights:
    """The weights of one checkpoint, to be written in ``dtype`` (buffers keep their own).

    Args:
        folder: of the checkpoint.
        model: on the meta device; says how transformers names parameters in files.
        dtype: of the exported parameters.
        adapter: the config's `model.adapter`; it is merged, or
        alone: exported by itself, as peft does.

    Raises:
        StorageError: the model's own files, where frozen weights are, have changed.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        dtype: torch.dtype,
        adapter: AdapterConfig | None = None,
        alone: bool = False,
    ) -> None:
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        self._slices = Slices(folder, self.state)
        if self._slices.origin:
            self._slices.origin.verify(folder.parent.parent)
        self._model, self._dtype, self._alone = model, dtype, alone
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._keys: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # in the checkpoint
        kind, frozen = weights_kind(self.state), None
        for held, shape, trained in self.state["parameters"]:
            name = plain_name(held) if adapter else held
            if self._slices.origin and held in self._slices.origin.packed:  # merged into what its 4 bits stand for
                shape = self._slices.origin.packed[held][0]
            self._shapes[name], self._keys[name] = tuple(shape), f"{kind if trained else 'frozen'}/{held}"
            if not trained and frozen is None:
                frozen = self._slices.dtype(self._keys[name])
            self._dtypes[name] = torch.float32 if trained or frozen is None else frozen
        self._pieces = pieces_by_module(self._shapes) if adapter else {}
        self._scale = adapter.alpha / adapter.rank if adapter else 0.0
        self._block: tuple[str, int, torch.Tensor] | None = None  # the last merged rows: name, number, values
        self._parameters = [name for name in self._shapes if not self._pieces or piece_of(name) is None]
        self.trained_whole = [n for n in self._parameters if self._pieces and self._keys[n].startswith(f"{kind}/")]
        for name, shape in self.state["buffers"]:
            self._shapes[name], self._keys[name] = tuple(shape), f"buffer/{name}"
            self._dtypes[name] = self._slices.dtype(self._keys[name]) if math.prod(shape) else torch.float32
        self._buffers = [name for name, _ in self.state["buffers"]]
        self.entries = self._plan_alone() if alone else self._plan()
        self.total_bytes = sum(entry.bytes for entry in self.entries)

    def _plan(self) -> list[Entry]:
        """The export's tensors, in the checkpoint's order."""
        entries = []
        for name in self._parameters:
            meta = torch.empty(self._shapes[name], dtype=self._dtype, device="meta")
            for n, tensor in self._for_files(name, meta).items():
                shape = tuple(tensor.shape)
                entries.append(Entry(n, name, shape, self._dtype, n != name or shape != self._shapes[name]))
        if len({entry.name for entry in entries}) != len(entries):  # a family that joins several parameters in files
            entries = [Entry(name, name, self._shapes[name], self._dtype) for name in self._parameters]
        return entries + [Entry(name, name, self._shapes[name], self._dtypes[name]) for name in self._buffers]

    def _plan_alone(self) -> list[Entry]:
        """The adapter's pieces and what was trained as a whole, as peft names them."""
        names = [*(name for pieces in self._pieces.values() for name in pieces.values()), *self.trained_whole]
        return [Entry(name_in_folder(name), name, self._shapes[name], self._dtype) for name in names]

    def _for_files(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """A parameter under the names that files of this model family use."""
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, torch.Tensor] = revert_weight_conversion(self._model, {name: tensor})
        return found

    # -- reading the checkpoint

    def _chunk(self, name: str, begin: int, length: int) -> torch.Tensor:
        if name.removesuffix(".weight") not in self._pieces:
            return self._held(name, begin, length)
        # always the same blocks of rows: a product's last bits may depend on its shape
        width = self._shapes[name][1]
        size = max(_CHUNK // width, 1) * width
        blocks = range(begin // size, -(-(begin + length) // size))
        parts = [self._merged(name, block, size)[max(begin - block * size, 0) :] for block in blocks]
        return torch.cat(parts)[:length]

    def _merged(self, name: str, number: int, size: int) -> torch.Tensor:
        """A block of ``size`` elements, whole rows, of a weight with its adapter; fp32, flat."""
        if self._block is None or self._block[:2] != (name, number):
            shape, begin = self._shapes[name], number * size
            rows = self._held(name, begin, min(size, math.prod(shape) - begin)).float().view(-1, shape[1])
            pieces = self._pieces[name.removesuffix(".weight")]
            update = Update(
                self.whole(pieces["lora_A"], torch.float32),
                self.whole(pieces["lora_B"], torch.float32),
                self.whole(found, torch.float32) if (found := pieces.get("lora_magnitude_vector")) else None,
                self._scale,
                is_transposed(self._model.get_submodule(name.removesuffix(".weight"))),
            )
            self._block = name, number, update.apply(rows, begin // shape[1]).view(-1)
        return self._block[2]

    def _held(self, name: str, begin: int, length: int) -> torch.Tensor:
        """Elements of a flattened tensor as the checkpoint has it."""
        chunk = torch.empty(length, dtype=self._dtypes[name])
        numel, key = math.prod(self._shapes[name]), self._keys[name]
        self._slices.read_into(key, Shard(key.partition("/")[2], numel, begin, length, {}), chunk)
        return chunk

    def whole(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter or buffer of the checkpoint, whole."""
        numel = math.prod(self._shapes[name])
        return self._chunk(name, 0, numel).to(dtype).view(self._shapes[name]) if numel else torch.empty(0, dtype=dtype)

    def _copy_to(self, target: torch.Tensor, name: str, merged: bool = True) -> None:
        """Fill a contiguous tensor with the checkpoint's values; not ``merged``: without an adapter's update."""
        numel, flat = math.prod(self._shapes[name]), target.view(-1)
        for begin in range(0, numel, _CHUNK):
            length = min(_CHUNK, numel - begin)
            flat[begin : begin + length] = (self._chunk if merged else self._held)(name, begin, length)

    def chunks(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The flattened tensor of an entry, in order, in its dtype."""
        if entry.split:
            tensor = self._for_files(entry.source, self.whole(entry.source, entry.dtype))[entry.name]
            yield tensor.contiguous().view(-1)
            return
        numel = math.prod(entry.shape)
        for begin in range(0, numel, _CHUNK):
            yield self._chunk(entry.source, begin, min(_CHUNK, numel - begin)).to(entry.dtype)

    # -- writing

    def write(self, folder: Path, max_bytes: int) -> None:
        """model.safetensors, or shards of ``max_bytes`` at most (but one tensor at least) and their index; an adapter's
        adapter_model.safetensors."""
        if self._alone:
            with (folder / "adapter_model.safetensors").open("wb") as file:
                self._write_shard(file, self.entries)
            return
        shards: list[list[Entry]] = [[]]
        for entry in self.entries:
            if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > max_bytes:
                shards.append([])
            shards[-1].append(entry)
        weight_map = {}
        for index, shard in enumerate(shards, 1):
            file_name = (
                f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            )
            with (folder / file_name).open("wb") as file:
                self._write_shard(file, shard)
            weight_map.update({entry.name: file_name for entry in shard})
        if len(shards) > 1:
            index_file = folder / "model.safetensors.index.json"
            write_json(index_file, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})

    def _write_shard(self, file: IO[bytes], shard: list[Entry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in shard:
            span = [offset, offset + entry.bytes]
            header[entry.name] = {
                "dtype": _DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": span,
            }
            offset = span[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in shard:
            for chunk in self.chunks(entry):
                file.write(chunk.view(torch.uint8).numpy().data)

    # -- checking

    def check(
        self,
        folder: Path,
        trust_remote_code: bool,
        base: tuple[str, torch.dtype] | None = None,
        example: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Read the export back: every element equals the checkpoint's; for smaller models plain transformers also
        loads the folder and gives the logits of the checkpoint's weights. Raises StorageError.

        ``base``: path and dtype of the model that an adapter by itself belongs to; ``example``: inputs to compare
        logits on, by default token ids.
        """
        files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            files.update(dict.fromkeys(file.keys(), file))
        for entry in self.entries:
            begin = 0
            for chunk in self.chunks(entry):
                if not torch.equal(elements(files[entry.name], entry.name, begin, len(chunk)), chunk):
                    raise StorageError(f"{folder}: {entry.name} was not written as the checkpoint has it; try again")
                begin += len(chunk)
        size = sum(4 * math.prod(self._shapes[name]) for name in self._parameters) if self._alone else self.total_bytes
        if size <= _LOGITS_BYTES and len(set(files.values())) == 1:  # else it would hold more than the largest file
            self._check_logits(folder, trust_remote_code, base, example)

    def _check_logits(
        self,
        folder: Path,
        trust_remote_code: bool,
        base: tuple[str, torch.dtype] | None,
        example: Mapping[str, torch.Tensor] | None,
    ) -> None:
        kind, dtype = type(self._model), torch.float32 if base else self._dtype
        source, held = base or (folder, dtype)
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # several tensors at once would be held twice for a while
        loaded, report = kind.from_pretrained(
            source,
            config=self._model.config if base else None,
            dtype=held,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
        wrong = {key: sorted(map(str, value)) for key, value in report.items() if value}
        if wrong and not base:
            raise StorageError(f"{folder}: transformers does not take the export as it is: {wrong}")
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in (example or {}).items()}
        if not inputs:
            vocabulary = int(loaded.get_input_embeddings().weight.shape[0])
            ids = torch.arange(_TOKENS)[None] * 7919 % vocabulary
            if kind.__name__.endswith("ForMultipleChoice"):
                ids = ids[None]  # these read [samples, choices, length]
            inputs = {"input_ids": ids}
            if getattr(loaded.config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = ids
        if base:
            import peft

            if self._slices.origin:  # the adapter was trained over what the 4 bits stand for
                for name in map(plain_name, self._slices.origin.packed):
                    self._copy_to(loaded.get_parameter(name).data, name, merged=False)
            expected = kind._from_config(loaded.config, dtype=dtype)
            loaded = peft.PeftModel.from_pretrained(loaded.float(), str(folder)).base_model.model
        with torch.no_grad():
            found = _outputs(loaded.eval()(**inputs))
            if not base:
                expected = loaded  # one model in memory, not two
            tensors = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
            for name in (*self._parameters, *self._buffers):
                if name in tensors:
                    self._copy_to(tensors[name], name)
            wanted = _outputs(expected.eval()(**inputs))
        tolerance = 1e-5 if dtype == self._dtype else 2e-2  # an adapter rounded to bf16
        if not torch.allclose(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True):
            difference = float((found - wanted).abs().max())
            raise StorageError(f"{folder}: logits of the reloaded export differ by {difference} from the checkpoint's")


def _outputs(output: Any) -> torch.Tensor:
    """All float tensors of a model's output, flattened: logits, whatever the head calls them."""
    found = [v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return torch.cat([value.float().reshape(-1) for value in found])
