"""Builds or loads the model, partitioned from the first parameter on where ZeRO-3 is used."""

from __future__ import annotations

import copy
import ctypes
import difflib
import functools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from trainer.adafactor import Adafactor
from trainer.adapters import add_adapter, plain_name
from trainer.config.schema import ModelConfig, OptimizerConfig
from trainer.config.trained import ParameterGroup, Unfreeze
from trainer.failures import UserError
from trainer.float8 import use_float8
from trainer.four_bit import packing, share_scales
from trainer.kernels import fuse_kernels
from trainer.layers import compile_layers, experts, gather_whole, keep_statistics, set_recomputation
from trainer.parameters import whole_shape
from trainer.selection import check_trained, depths, select, trained_names
from trainer.unfreezing import FROM_STEP
from trainer.vocabulary import resize_embeddings

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_NORM = re.compile(r"(^|[._])(ln|norm|layernorm|rmsnorm)", re.IGNORECASE)
_NO_RULE = ParameterGroup(match=("*",), learning_rate_factor=1.0)


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Inside, glibc gives large freed blocks back to the system at once; loading frees as much as the model holds.

    Its default keeps them (the threshold follows the largest block freed), and a rank on CPUs would hold a whole model
    for a while. Afterwards the threshold is the largest that the default would have reached.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        yield
        return
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        mallopt(option, 1 << 20)
    try:
        yield
    finally:
        ctypes.CDLL(None).malloc_trim(0)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def build_model(
    config: ModelConfig,
    auto_class: Any,
    deepspeed_config: dict[str, Any],
    attention: str | None,
    seed: int,
    configure: Callable[[Any], None] = lambda _: None,
) -> torch.nn.Module:
    """The model of a config, on this rank.

    Under ZeRO-3 each parameter is partitioned as soon as it exists; pretrained weights are read by one rank,
    parameter by parameter, and scattered, so no rank ever holds the whole model. Random weights are drawn
    by one rank from ``seed``: they do not depend on the world size.

    Args:
        config: the config's `model` section.
        auto_class: for example ``transformers.AutoModelForCausalLM``.
        deepspeed_config: the whole DeepSpeed JSON.
        attention: a transformers attention implementation, or None for its default.
        seed: of random weights.
        configure: sets what the task needs in the transformers config.

    Raises:
        UserError: the model cannot be built or read.
    """
    from transformers.integrations import HfDeepSpeedConfig

    replaced: AbstractContextManager[Any] = nullcontext()
    packed = config.adapter if config.adapter is not None and config.adapter.type == "qlora" else None
    make = functools.partial(auto_class.from_config, trust_remote_code=config.trust_remote_code)
    with named_errors(config):
        model_config = load_model_config(config)
        labels = getattr(model_config, "num_labels", None)
        configure(model_config)
        if packed is not None:
            replaced = packing(functools.partial(make, copy.deepcopy(model_config)), packed)
        anew = _of_other_labels(model_config, labels, make) if config.path is not None else set()
    # transformers keeps only a weak reference to this object, and partitions models while it lives
    partitioning = HfDeepSpeedConfig(deepspeed_config) if deepspeed_config["zero_optimization"]["stage"] == 3 else None
    dtype = DTYPES[config.dtype]
    torch.manual_seed(seed)
    with named_errors(config), returning_freed_memory():
        if config.config is not None:
            model = auto_class.from_config(model_config, dtype=dtype, attn_implementation=attention)
        else:
            with replaced:
                model, found = auto_class.from_pretrained(
                    config.path,
                    config=model_config,
                    dtype=dtype,
                    attn_implementation=attention,
                    trust_remote_code=config.trust_remote_code,
                    use_safetensors=True,  # never a pickle
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # and does nothing under ZeRO-3, where this does
                    key_mapping={f"^{re.escape(name)}$": f"of_other_labels.{name}" for name in anew} or None,
                )
            if wrong := sorted({name for name, *_ in found["mismatched_keys"]} - anew):
                raise UserError(f"model.path {config.path!r}: {wrong[0]} is of another size than its config.json says")
            if packed is not None:
                share_scales(model, packed)
    resize_embeddings(model, config)
    choose_trained(model, config, seed)
    del partitioning
    model.config.use_cache = False
    print(f"model.kernels: {fuse_kernels(model, config)}", flush=True)
    if config.fp8 != "none":
        print(f"model.fp8: {use_float8(model, config)}", flush=True)
    keep_statistics(model, config)
    set_recomputation(model, config)
    gather_whole(experts(model))
    if config.compile:
        print(f"model.compile: {compile_layers(model, config)}", flush=True)
    result: torch.nn.Module = model
    return result


def _of_other_labels(wanted: Any, labels: int | None, make: Callable[[Any], Any]) -> set[str]:
    """Parameters of a head for another number of labels than the task has; it is made anew, as where there is none.

    Args:
        wanted: the transformers config as the task has set it.
        labels: how many it had before; None: its models have none.
        make: a model of a config.
    """
    if labels is None or labels == wanted.num_labels:
        return set()
    shapes = []
    for number in (labels, wanted.num_labels):
        kind = copy.deepcopy(wanted)
        kind.num_labels = number
        with torch.device("meta"):
            shapes.append({name: parameter.shape for name, parameter in make(kind).named_parameters()})
    return {name for name, shape in shapes[0].items() if shape != shapes[1][name]}


def load_model_config(config: ModelConfig) -> Any:
    """The transformers config of a config's `model` section. Raises UserError where it is none."""
    import transformers

    with named_errors(config):
        if config.config is not None:
            return _inline_config(dict(config.config))
        return transformers.AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)


def _inline_config(arguments: dict[str, Any]) -> Any:
    """A transformers config of `model.config`. Raises UserError for what transformers would pass over in silence."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = arguments.pop("model_type")
    if family not in CONFIG_MAPPING:
        close = difflib.get_close_matches(family, list(CONFIG_MAPPING), 1)
        more = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"model.config.model_type: transformers {transformers.__version__} has no {family!r}{more}")
    made = transformers.AutoConfig.for_model(family, **arguments)
    kind = type(made)
    try:
        known = {*vars(kind()), *kind().to_dict(), *kind.attribute_map, *transformers.GenerationConfig().to_dict()}
    except Exception:  # of kinds that cannot be made without arguments nothing is known
        return made
    for name in sorted(arguments.keys() - known - {name.lstrip("_") for name in known}):
        if close := difflib.get_close_matches(name, known, 1, 0.93):  # a slip of the pen, not what versions differ in
            raise UserError(f"model.config.{name}: {family} has no such key; did you mean `{close[0]}`?")
    return made


@contextmanager
def named_errors(config: ModelConfig) -> Iterator[None]:
    """What transformers raises inside becomes a UserError that names the config's key."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ValueError, OSError, ImportError, KeyError, TypeError, StrictDataclassError) as error:
        origin = f"model.path {config.path!r}" if config.path else "model.config"
        raise UserError(f"{origin}: the model cannot be built: {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):  # as ZeRO-3 has it
            raise
        raise UserError(
            f"model.path {config.path!r}: weights are of other sizes than config.json says: {error}"
        ) from error


def choose_trained(model: torch.nn.Module, config: ModelConfig, seed: int) -> None:
    """Stop the gradients of what is not trained, by `freeze` and `train_only`, or because there is an adapter."""
    if config.adapter is not None:
        add_adapter(model, config.adapter, seed)
        return
    names = dict(model.named_parameters())
    trained = trained_names(list(names), config.freeze, config.train_only)
    for name in names.keys() - trained:
        names[name].requires_grad_(False)


def build_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, unfreeze: Sequence[Unfreeze] = ()
) -> torch.optim.Optimizer:
    """AdamW or Adafactor over the trained parameters; weight decay on matrices only, not on biases, norms and other
    vectors.

    Each of its groups has an ``lr_factor``: its learning rate / `learning_rate`, all through the schedule; and
    ``from_step``: the first step that trains it, by `training.unfreeze`.

    Raises:
        UserError: a rule matches no parameter that is trained, or there is nothing to train at first.
    """
    parameters = dict(model.named_parameters())
    plain = [plain_name(name) for name in parameters]
    trained = {plain_name(name) for name, parameter in parameters.items() if parameter.requires_grad}

    def matched(match: Sequence[str], key: str) -> set[str]:
        names = select(plain, match, key)
        check_trained(names, trained, key)
        return names

    rules: dict[str, ParameterGroup] = {}
    for index, rule in enumerate(config.groups):
        for name in matched(rule.match, f"training.optimizer.groups.{index}.match"):
            rules.setdefault(name, rule)
    starts: dict[str, int] = {}
    for index, later in enumerate(unfreeze):
        for name in matched(later.match, f"training.unfreeze.{index}.match"):
            starts.setdefault(name, later.from_step)
    depth, top = depths(plain)
    groups: dict[tuple[float, float, int], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            name = plain_name(name)
            rule = rules.get(name, _NO_RULE)
            factor = (config.layer_decay or 1.0) ** (top - depth[name]) * (rule.learning_rate_factor or 1.0)
            if rule.learning_rate is not None:
                factor = rule.learning_rate / config.learning_rate
            decay = config.weight_decay if len(whole_shape(parameter)) >= 2 and not _NORM.search(name) else 0.0
            decay = decay if rule.weight_decay is None else rule.weight_decay
            groups.setdefault((factor, decay, starts.get(name, 1)), []).append(parameter)
    if all(start > 1 for _, _, start in groups):
        raise UserError("training.unfreeze: it leaves nothing to train in the first steps; name fewer parameters")
    made = [
        {
            "params": members,
            "weight_decay": decay,
            "lr": config.learning_rate * factor,
            "lr_factor": factor,
            FROM_STEP: start,
        }
        for (factor, decay, start), members in groups.items()
    ]
    if config.type == "adafactor":
        return Adafactor(made, lr=config.learning_rate)
    return torch.optim.AdamW(made, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def quiet_libraries() -> None:
    """Leave warnings and errors of the libraries in the log, not their chatter."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed calls functions that torch has renamed: two warnings for every parameter of every step
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks by the older name
    # where it is installed, transformers imports it with the first model: 1.6 s, and lines in the log
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # as importlib marks what cannot be imported
