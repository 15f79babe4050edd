"""One module a task: how a record becomes samples, which model class it needs, its loss and metric."""

from __future__ import annotations

from trainer.config.schema import LaunchConfig
from trainer.tasks.causal_lm import CausalLM
from trainer.tokenizer import Tokenizer

Task = CausalLM  # every task has its shape


def get_task(config: LaunchConfig, tokenizer: Tokenizer) -> Task:
    """The task of a config."""
    return CausalLM(config, tokenizer)
