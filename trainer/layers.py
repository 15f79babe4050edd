"""The repeated layers of a model: what each keeps for its backward pass, and how each is compiled.

Under ZeRO-3 both want a layer's parameters gathered as one, before it begins: DeepSpeed's hooks on the modules inside
would break a compiled graph at each of them, and would run other operators when a layer is computed again than they did
the first time, which selective recomputation cannot have. DeepSpeed calls such a module a leaf.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.config.model import CheckpointedLayers, ModelConfig
from trainer.failures import UserError
from trainer.kernels import on_gpu

# Kept by "selective": products with weights, and attention kernels; not bmm, the scores of eager attention.
_KEPT = re.compile(r"::(mm|addmm|_scaled_mm)$|attention|attn")


def repeated_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that transformers can checkpoint one by one, outermost first where they contain each other."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[torch.nn.Module] = []
    inside: set[torch.nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Lists of experts that are modules each (Switch Transformers, NLLB-MoE): which of them run, tokens decide, on
    every rank otherwise; ranks that gathered them one by one would wait for each other for ever.
    """
    kinds = (torch.nn.ModuleDict, torch.nn.ModuleList)
    return [m for m in model.modules() if isinstance(m, kinds) and type(m).forward is not torch.nn.Module.forward]


def gather_whole(layers: list[torch.nn.Module]) -> None:
    """Let ZeRO-3 gather and release the parameters of each of ``layers`` as one; before the engine is made."""
    for layer in layers:
        layer._z3_leaf = True  # type: ignore[assignment]  # what deepspeed.utils.set_z3_leaf_module does


def set_recomputation(model: Any, config: ModelConfig) -> None:
    """Have the layers keep what `gradient_checkpointing` and `activation_offload` say, and compute the rest again.

    Raises:
        UserError: the model's layers cannot do it.
    """
    wanted = config.gradient_checkpointing
    if wanted is False:
        return
    if wanted == "auto":  # decided by the plan of a run; elsewhere
        wanted = True
    options: dict[str, Any] = {"use_reentrant": False}
    layers = repeated_layers(model)
    if (wanted is not True or config.activation_offload) and not layers:
        raise UserError(
            f"model.gradient_checkpointing: {type(model).__name__} has no layers that transformers can checkpoint "
            "one by one: set it to true or false, and model.activation_offload to false"
        )
    if wanted == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
        gather_whole(layers)
    try:
        if hasattr(model, "activation_checkpointing_enable"):  # the newer name
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise UserError(f"model.gradient_checkpointing: {str(error).rstrip('.')}; set it to false") from error
    every = wanted.every if isinstance(wanted, CheckpointedLayers) else 1
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every == 0  # type: ignore[assignment]
        if config.activation_offload:
            layer._gradient_checkpointing_func = _offloading(functools.partial(checkpoint, **options))  # type: ignore[assignment]


def keep_statistics(model: torch.nn.Module, config: ModelConfig) -> None:
    """Leave batch normalisation at the statistics that it came with, while its weights are trained: those of a batch
    depend on how it is cut into micro-batches, and would be others on every rank.

    Raises:
        UserError: the weights are random, and there are none.
    """
    found = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    if found and config.path is None:
        raise UserError(
            f"model.config: {type(model).__name__} normalises by statistics of batches, which random weights do not "
            "have, and which ranks would each learn for themselves: start from a trained model (model.path)"
        )
    for module in found:
        module.eval()
        module.train = functools.partial(_as_it_is, module)  # type: ignore[method-assign,assignment]


def _as_it_is(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return module


@functools.lru_cache(maxsize=1024)
def _is_kept(name: str) -> bool:
    return _KEPT.search(name) is not None


def _keep(_context: Any, operator: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operator.name()) else CheckpointPolicy.PREFER_RECOMPUTE


def _offloading(checkpointed: Callable[..., Any]) -> Callable[..., Any]:
    """As ``checkpointed``; what it keeps, the tensors a layer is called with, is copied to host memory and back.

    Pinned where there is a GPU, so that the host need not wait for the copies. On a CPU they are copied as well.
    """

    def call(function: Callable[..., Any], *inputs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            return checkpointed(function, *inputs)

    return call


def compile_layers(model: torch.nn.Module, config: ModelConfig) -> str:
    """Have torch.compile make one program of each layer, forward and backward, at its first call; what was done.

    Layer by layer: a whole model's graph would keep what ZeRO-3 gathers. Layers of a kind share one compiled program.
    Where the compiler fails on one, or there is none, that layer runs as it is, and the log says why.
    """
    layers = repeated_layers(model)
    if not layers:
        return f"not compiled: {type(model).__name__} has no layers that transformers can run one by one"
    gather_whole(layers)  # on all ranks alike, also where one has no compiler
    if problem := _no_compiler():
        return f"not compiled: {problem}"
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # it warns, and runs what it cannot compile
    mode = "default" if isinstance(config.compile, bool) else config.compile.mode
    for layer in layers:
        layer.forward = torch.compile(layer.forward, mode=mode)
    return f"{len(layers)} layers, each compiled at its first call (mode {mode})"


def _no_compiler() -> str | None:
    if on_gpu() and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    variable, usual = ("CC", ("gcc", "cc", "clang")) if on_gpu() else ("CXX", ("g++", "c++", "clang++"))
    wanted = (os.environ[variable],) if variable in os.environ else usual
    if not any(map(shutil.which, wanted)):
        return f"{' or '.join(wanted)} is not on this node; install a compiler, or name it in {variable}"
    return None
