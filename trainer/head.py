"""`task.head`: layers of one's own choice on a model, in training and export. `trainer.modeling_head` has the model."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

from trainer.config.tasks import HeadConfig
from trainer.failures import UserError


class HeadAuto:
    """Stands where one of transformers' auto classes does: makes and loads the model of a config with `task_head`."""

    def __init__(self, auto_class: str) -> None:
        self._auto_class = auto_class

    def from_config(self, config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        return self._kind(config)._from_config(config, **options)

    def from_pretrained(self, path: str, config: Any, **options: Any) -> Any:
        return self._kind(config).from_pretrained(path, config=config, **options)

    def _kind(self, config: Any) -> Any:
        from trainer.modeling_head import model_class

        return model_class(config.auto_map[self._auto_class].rpartition(".")[2])


def set_head(model_config: Any, auto_class: str, head: HeadConfig | None) -> None:
    """Name the head in a transformers config, and the code that an export of it is loaded with.

    Raises:
        UserError: the model has a part that such a head does not stand on.
    """
    if head is None:
        if getattr(model_config, "task_head", None) is not None:  # of an export; the model's own head takes its place
            del model_config.task_head, model_config.auto_map
        return
    import transformers

    kind, task = model_config.model_type, auto_class.removeprefix("AutoModel")
    native = getattr(transformers, auto_class)._model_mapping.get(type(model_config), None)
    base = native and getattr(transformers, f"{native.__name__.removesuffix(task)}Model", None)
    if base is None or "input_ids" not in inspect.signature(base.forward).parameters:
        raise UserError(f"task.head: transformers has no {task} of {kind} to put a head on; leave it out")
    if model_config.is_encoder_decoder:
        raise UserError(f"task.head: {kind} reads a text by two stacks, and has its own head for that; leave it out")
    model_config.task_head = head.model_dump(mode="json")
    model_config.auto_map = {auto_class: f"modeling_head.{native.__name__.removesuffix(task)}WithHead{task}"}


def save_head(folder: Path) -> None:
    """Write the code that an export is loaded with."""
    shutil.copy(Path(__file__).with_name("modeling_head.py"), folder)
