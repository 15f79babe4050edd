"""Models of transformers with layers of one's own choice in place of their head (dsft's `task.head`).

dsft trains with this file and writes it beside the weights that it exports. transformers runs it there, since
config.json names it under `auto_map`:

    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)

`task_head` in config.json has `hidden_sizes`, `dropout` and `pooling`. Classes are made by their names:
`BertWithHeadForTokenClassification` is a `BertModel` with a head that reads its tokens.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

_NAME = re.compile(r"(\w+)WithHead(ForSequenceClassification|ForTokenClassification|ForMultipleChoice)")


def __getattr__(name: str) -> Any:
    """A class by its name, as transformers asks for it."""
    return model_class(name)


@functools.cache
def model_class(name: str) -> Any:
    """The class of a name. Raises AttributeError where transformers has no such model."""
    match = _NAME.fullmatch(name)
    base: Any = getattr(transformers, f"{match[1]}Model", None) if match else None
    if match is None or base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    chooses, pools = match[2] == "ForMultipleChoice", match[2] != "ForTokenClassification"
    family: Any = next(kind for kind in base.__mro__ if kind.__name__.endswith("PreTrainedModel"))
    without_pooler = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(base).parameters else {}

    class WithHead(family):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, base(config, **without_pooler))
            self.task_head = make_head(config, 1 if chooses else config.num_labels)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if not isinstance(module, _Linear):
                super()._init_weights(module)
                return
            nn.init.normal_(module.weight, std=getattr(self.config.get_text_config(), "initializer_range", 0.02))
            nn.init.zeros_(module.bias)

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
            """Logits [samples, labels], [samples, tokens, labels] or [samples, choices], for texts as the base takes
            them; of a multiple choice [samples, choices, tokens]."""
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
            choices = input_ids.shape[1] if chooses else None
            if chooses:
                inputs = {name: rows.flatten(0, 1) for name, rows in inputs.items() if isinstance(rows, torch.Tensor)}
            output = getattr(self, self.base_model_prefix)(**inputs)
            hidden = output[0]
            if pools:
                hidden = pooled(hidden, inputs.get("attention_mask"), self.config.task_head["pooling"])
            logits = self.task_head(hidden)
            return SequenceClassifierOutput(
                logits=logits if choices is None else logits.view(-1, choices),
                hidden_states=getattr(output, "hidden_states", None),
                attentions=getattr(output, "attentions", None),
            )

    WithHead.__name__ = WithHead.__qualname__ = name
    # of the inputs that a tokenizer gives, callers leave out what is not in it
    WithHead.forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return WithHead


class _Linear(nn.Linear):
    """A layer of a head, told apart from the family's own, which draws them in its own ways."""


def make_head(config: Any, outputs: int) -> nn.Sequential:
    """Layers with GELU in between, from the width of hidden states to ``outputs``, each behind a dropout."""
    head = config.task_head
    widths = [config.get_text_config().hidden_size, *head["hidden_sizes"], outputs]
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(zip(widths, widths[1:])):  # noqa: B905, RUF007
        layers += [nn.GELU()] if index else []
        layers += [nn.Dropout(head["dropout"]), _Linear(width, following)]
    return nn.Sequential(*layers)


def pooled(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One vector a text, [texts, width], from those of its tokens, [texts, tokens, width].

    Args:
        mask: [texts, tokens], 0 for padding, on either side; None: there is none.
        pooling: `cls` (the first token), `last`, `mean` or `max`.
    """
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    if hidden.shape[:2] != mask.shape:
        raise ValueError(f"pooling needs a vector a token, {list(mask.shape)}; the model gives {list(hidden.shape)}")
    if pooling in ("cls", "last"):
        first = (mask if pooling == "cls" else mask.flip(1)).long().argmax(1)
        places = first if pooling == "cls" else mask.shape[1] - 1 - first
        return hidden[torch.arange(len(hidden), device=hidden.device), places]
    held = mask.bool()[:, :, None]
    if pooling == "max":
        return hidden.masked_fill(~held, torch.finfo(hidden.dtype).min).amax(1)
    total = hidden.float().masked_fill(~held, 0.0).sum(1)
    return (total / held.sum(1)).to(hidden.dtype)
