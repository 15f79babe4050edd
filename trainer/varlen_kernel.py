"""torch's kernel for `trainer.attention`, in a module of its own: it brings torch's compiler along, a second."""

from __future__ import annotations

import inspect

from torch.nn.attention.varlen import varlen_attn as varlen_attn

# torch 2.11 takes fewer keys than queries as they come, later ones want to be told
TOLD_OF_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
