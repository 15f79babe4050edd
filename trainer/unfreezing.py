"""Gradual unfreezing (Howard & Ruder 2018, ULMFiT): parameter groups that are left as they are until a step.

ZeRO lays out its optimizer once, so that these parameters are in it from the start. Until their step they are as frozen
ones: their gradients are zero before they count in the norm, and the optimizer does not see them, so that weights,
decay, moments and step counts wait.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

FROM_STEP = "from_step"  # of a parameter group: the first step that trains it


class Unfreezing:
    """To be made before DeepSpeed takes the parameters out of the groups.

    Attributes:
        step: the one under way, from 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.step = 1  # a loop that never says which step it is trains what is trained from the first on
        for group in optimizer.param_groups:
            if group.get(FROM_STEP, 1) > 1:
                for parameter in group["params"]:
                    parameter.register_hook(functools.partial(self._gradient, group[FROM_STEP]))
        self._hidden: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        optimizer.register_step_pre_hook(self._hide)
        optimizer.register_step_post_hook(self._show)

    def _gradient(self, from_step: int, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient) if self.step < from_step else gradient

    def _hide(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """An optimizer passes over what has no gradient."""
        for group in optimizer.param_groups:
            if self.step < group.get(FROM_STEP, 1):
                for flat in group["params"]:
                    self._hidden.append((flat, flat.grad))
                    flat.grad = None

    def _show(self, *_: Any) -> None:
        """Offloaded gradients are written to where they were before."""
        for flat, gradient in self._hidden:
            flat.grad = gradient
        self._hidden.clear()
