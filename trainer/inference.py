"""A trained model on every rank by itself, as `dsft predict` and `dsft eval` use it: the folder of an export."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from trainer.attention import inference_attention
from trainer.config.schema import LaunchConfig, ModelConfig
from trainer.failures import UserError
from trainer.kernels import on_gpu
from trainer.model import DTYPES, load_model_config, quiet_libraries
from trainer.tasks import get_task, task_tokenizer
from trainer.tasks.base import BaseTask, Objective


class Replica:
    """A whole model in the place of an `Engine`: it never waits for other ranks."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def probe(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def eval(self) -> None:
        self.model.eval()

    def train(self) -> None:
        """Nothing: it is never trained."""

    @contextmanager
    def generating(self) -> Iterator[tuple[Any, bool]]:
        """(the model, False: no call waits for other ranks), as `Engine.generating`."""
        yield self.model, False

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()


def load_replica(config: LaunchConfig) -> tuple[BaseTask, Replica, Objective]:
    """The task of a config, its model (`model.path`) on this rank's device, and what runs the one on the other.

    Raises:
        UserError: the folder is no model for the task.
    """
    quiet_libraries()
    device = torch.device("cpu")
    if on_gpu():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    task = get_task(config, task_tokenizer(config))
    model = _load(config.model, task).to(device)
    objective = task.objective(model, str(getattr(model.config, "_attn_implementation", "unknown")), device)
    replica = Replica(model)
    replica.eval()
    return task, replica, objective


def _load(config: ModelConfig, task: BaseTask) -> Any:
    try:
        model_config = load_model_config(config)
        task.configure(model_config)
        model, found = task.auto.from_pretrained(
            config.path,
            config=model_config,
            dtype=DTYPES[config.dtype],
            attn_implementation=inference_attention(config.attention),
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
        )
    except (ValueError, OSError, ImportError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{config.path}: the model cannot be read: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{config.path} has no weights {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} of "
            f"{type(model).__name__}: it was not trained for {task.config.task.type}"
        )
    return model


def read_request(run_dir: Path) -> dict[str, Any]:
    """What the launcher has asked for."""
    request: dict[str, Any] = json.loads((run_dir / "request.json").read_text(encoding="utf-8"))
    return request
