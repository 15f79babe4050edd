"""An adapter in an export: merged into the weights row by row, or a folder that peft loads onto the original model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.adapters import head_modules, is_linear, is_transposed, lora_config, piece_of
from trainer.config.trained import AdapterConfig
from trainer.failures import UserError
from trainer.selection import adapter_targets

PREFIX = "base_model.model."  # of every name in a peft folder
_TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one matrix: scale B A, and with DoRA the lengths of the sum's rows.

    Attributes:
        a: fp32 [rank, in].
        b: fp32 [out, rank].
        magnitude: fp32 [out], or None.
        transposed: the matrix is kept as [in, out].
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    scale: float
    transposed: bool

    def apply(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Rows of the matrix from ``first`` on, fp32 [n, columns], with the update."""
        last = first + len(rows)
        product = self.a[:, first:last].T @ self.b.T if self.transposed else self.b[first:last] @ self.a
        merged = rows + self.scale * product
        if self.magnitude is not None:
            merged *= (self.magnitude[first:last] / merged.norm(dim=1))[:, None]
        return merged


def pieces_by_module(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Module -> kind of piece (``lora_A``, ...) -> the parameter's name."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        piece = piece_of(name)
        if piece is not None:
            found.setdefault(piece[0], {})[piece[1]] = name
    return found


def name_in_folder(name: str) -> str:
    """A parameter's name in a peft folder: an adapter's piece, or a weight trained as a whole."""
    piece = piece_of(name)
    if piece is None:
        return PREFIX + name
    return f"{PREFIX}{piece[0]}.{piece[1]}" + ("" if piece[1] == "lora_magnitude_vector" else ".weight")


def write_config(
    folder: Path, model: Any, config: AdapterConfig, trained: Collection[str], model_path: str | None, auto_class: str
) -> None:
    """adapter_config.json.

    Args:
        model: without the adapter, on the meta device.
        trained: parameters trained as a whole.
        model_path: of the model that the adapter belongs to.

    Raises:
        UserError: peft cannot hold what was trained.
    """
    if model_path is None:
        raise UserError("an adapter by itself needs the weights it belongs to; with `model.config` use --adapter merge")
    heads = head_modules(model)
    modules = {top if (top := name.partition(".")[0]) in heads else name.rpartition(".")[0] for name in trained}
    embeddings = model.get_input_embeddings()
    for name in modules:
        if getattr(model.config, "tie_word_embeddings", False) and model.get_submodule(name) is embeddings:
            raise UserError(f"{name} was trained and is tied to the head, which peft would untie: use --adapter merge")
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    targets = adapter_targets(list(linear), config.targets)
    lora_config(
        config,
        short_names(targets, list(linear)),
        is_transposed(linear[targets[0]]),
        modules_to_save=sorted(modules) or None,
        base_model_name_or_path=model_path,
        task_type=_TASK_TYPES.get(auto_class),
        inference_mode=True,
    ).save_pretrained(folder)


def short_names(targets: list[str], linear: list[str]) -> list[str]:
    """``targets`` by their last names, where those mean no other linear module; readers prefer them."""
    others = {name.rpartition(".")[2] for name in set(linear) - set(targets)}
    short = {name: name.rpartition(".")[2] for name in targets}
    return sorted({name if last in others else last for name, last in short.items()})
