"""The one module that talks to DeepSpeed: process group, ZeRO engine, and this rank's slices of the state.

Everything else sees plain tensors. A `Shard` names what a checkpoint needs of one parameter on this rank: the
fp32 master weights and Adam moments, as 1-D views into the flat groups of the ZeRO optimizer, and where in the
flattened parameter they begin. ZeRO-3 cuts each flattened parameter into W equal pieces (the last one padded);
stages 1 and 2 cut the concatenation of a group's parameters, so a piece may begin anywhere.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from trainer.adafactor import Adafactor, Piece, make_piece
from trainer.averaging import Average
from trainer.devices import take_gpu
from trainer.file_memory import FileMemory, share_gradients
from trainer.parameters import Shard, persistent_buffers, whole_shape
from trainer.unfreezing import FROM_STEP, Unfreezing

if TYPE_CHECKING:
    from trainer.origin import Origin

MOMENTS = ("exp_avg", "exp_avg_sq")
_FULL_MESH_RANKS = 64


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did: ``applied`` is False when gradients were not finite and it was skipped."""

    applied: bool
    grad_norm: float


def init_distributed(device: str, timeout_seconds: float) -> torch.device:
    """Join the job's process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by DeepSpeed at import
        os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")  # else it asks numactl, many times a step
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    # Muon, which ZeRO imports to see whether it is used, has torch.compile import its compiler: a second of every start
    with patch.object(compiler, "compile", return_value=compiler.dummy_decorator):
        import deepspeed.runtime.zero.muon.original_muon
    # DeepSpeed logs what a user cannot act on; its warnings and errors stay.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On CPUs DeepSpeed would compile a shared-memory all-reduce at start: a minute of g++, and a process killed in
    # it leaves a lock that hangs every later start. Gloo does the job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A gloo group connects every rank with every other when it is made; a ring needs a handful of these connections.
    if int(os.environ.get("WORLD_SIZE", "1")) > _FULL_MESH_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    own = take_gpu(int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", timeout=timeout, verbose=False)
    # Its own groups, in which gradients are summed, would have torch's default: 10 minutes with NCCL
    deepspeed.comm.comm.cdb.new_group = functools.partial(dist.new_group, timeout=timeout)
    return own


def in_files(memory: FileMemory | None) -> AbstractContextManager[None]:
    """Inside, ZeRO-3 makes in files what ``memory`` is for."""
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return memory.serving(Init, DeepSpeedZeroOptimizer_Stage3) if memory else contextlib.nullcontext()


def gathered(parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters inside the context (a collective; a no-op where they are not partitioned)."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()  # predictions need not import DeepSpeed
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(parameters))
    return context


def chunked_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Summed cross-entropy in fp32, [rows, vocabulary] and int64 [rows] to a scalar.

    DeepSpeed's works through blocks of rows (a Triton kernel on GPUs): fp32 logits and their gradient, most of the
    memory of a large vocabulary, never exist as a whole.
    """
    from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy as implementation

    loss: torch.Tensor = implementation(logits, labels, ignore_index=ignore_index, reduction="sum")
    return loss


def deepspeed_weights(folder: Path, tag: str) -> dict[str, torch.Tensor]:
    """fp32 weights and buffers of a checkpoint that plain DeepSpeed has written; all of them in memory.

    DeepSpeed's own reader would unpickle anything, and so run code of whoever has written the files. Here torch refuses
    all but tensors and the few classes of DeepSpeed that such checkpoints hold.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # over the `weights_only=False` in that reader
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            weights: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
    return weights


class Engine:
    """A model under ZeRO, with its optimizer.

    Args:
        model: built under ``zero.Init`` for stage 3; frozen parameters already have ``requires_grad=False``.
        optimizer: a torch optimizer over the trained parameters.
        config: the whole DeepSpeed JSON, as planned.
        ema_decay: of an average of the weights to keep (see `averaged`); None: none.
        memory: where states are kept that ``config`` has in host memory, if not there; the model was built `in_files`.
    """

    origin: Origin | None = None  # of frozen weights that checkpoints leave out
    _trained = False  # there was a backward pass

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        ema_decay: float | None = None,
        memory: FileMemory | None = None,
    ) -> None:
        import deepspeed

        self._unfreezing = Unfreezing(optimizer)
        self.memory = memory
        with in_files(memory):
            self._engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.model: torch.nn.Module = self._engine.module
        self.optimizer = optimizer
        self.stage = int(config["zero_optimization"]["stage"])
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._leaves = [p for p in self.model.parameters() if p.requires_grad and hasattr(p, "ds_z3_leaf_module")]
        self._pieces: dict[str, Piece] = {}
        if isinstance(optimizer, Adafactor):
            self._lay_out(optimizer)
        self._states = memory if memory and memory.optimizer else None
        if self._states:
            share_gradients(self._zero)
            self._ensure_moments()  # before the optimizer makes them in host memory
        copy = self._states.copy if self._states else torch.clone
        self._average = None if ema_decay is None else Average(self._flat_groups(), ema_decay, copy)

    def forward(self, **inputs: Any) -> Any:
        """The model's forward pass. Every rank must make the same number of calls."""
        return self._engine(**inputs)

    def probe(self, **inputs: Any) -> Any:
        """A forward pass in evaluation mode before training; nothing of it is kept. Every rank must make the call."""
        self.eval()
        # compiled layers are made for the shapes of training: this pass would have them made twice over
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            output = self._engine(**inputs)
        self.train()
        return output

    @contextlib.contextmanager
    def generating(self) -> Iterator[tuple[Any, bool]]:
        """(the model, to call its `generate`; whether every rank has to make the same number of passes)."""
        was_training = self.model.training
        self.eval()  # also without gradient checkpointing, which allows no cache
        try:
            yield self.model, self.stage == 3 and self.world_size > 1
        finally:
            self._engine.train(was_training)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. DeepSpeed averages over ranks: the caller multiplies by the world size."""
        self._trained = True
        self._engine.backward(loss, scale_wrt_gas=False)
        # ZeRO-3 reduces the gradients of a layer that is gathered as one (a leaf) when that of its output comes. None
        # does where a model reads hidden states, which transformers takes before it: LLaVA's of its vision tower.
        if passed_by := [parameter for parameter in self._leaves if parameter.grad is not None]:
            for parameter in passed_by:
                self._zero.reduce_ready_partitions_and_remove_grads(parameter)
            self._zero.independent_gradient_partition_epilogue()
        # With managed accumulation step() counts micro-batches; only the last one of a global batch updates.
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def begin_step(self, step: int) -> None:
        """Before the passes of an optimizer step, from 1: parameters that are unfrozen later do not take part."""
        self._unfreezing.step = step

    def step(self, learning_rate: float) -> StepResult:
        """Update the weights after the last `backward` of a global batch; a group's own rate is a multiple of this."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_factor", 1.0)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        applied = bool(self._engine.was_step_applied())
        if applied and self._average:
            self._average.update()
        return StepResult(applied, math.nan if norm is None else float(norm))

    def train(self) -> None:
        """To training mode.

        ZeRO-3 learns from its first passes which parameters to hold on to until they are used again, and caches the
        answer for good: taught by passes without a backward one, it would gather every layer twice in every step.
        """
        self._engine.train()
        if self.stage == 3 and not self._trained:
            coordinator = self._zero.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def eval(self) -> None:
        self._engine.eval()

    @property
    def keeps_average(self) -> bool:
        """Whether an average of the weights is kept."""
        return self._average is not None

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the average of its weights, if one is kept. Every rank must make the call."""
        if self._average is None:
            yield
            return
        self._average.swap()
        self._refresh()
        try:
            yield
        finally:
            self._average.swap()
            self._refresh()

    # -- state ---------------------------------------------------------------------------------------------------

    def shards(self, to_load: bool = False) -> Iterator[Shard]:
        """This rank's slices of every parameter, in the model's order. Of frozen weights, which ZeRO 1 and 2 leave
        whole, each rank writes a part, and loads all.
        """
        self._ensure_moments()
        for name, parameter in self.model.named_parameters():
            if self.stage == 3:
                yield self._zero3_shard(name, parameter)
            elif shard := self._fragment_shard(name, parameter, to_load):
                yield shard

    def parameters(self) -> list[tuple[str, tuple[int, ...], bool]]:
        """(name, whole shape, trained) of every parameter of the model; tied ones once."""
        return [(name, whole_shape(p), p.requires_grad) for name, p in self.model.named_parameters()]

    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) of the model's persistent buffers; ZeRO leaves them whole on every rank."""
        return persistent_buffers(self.model)

    def frozen_itemsize(self) -> int:
        """Bytes of one element of the weights that are not trained."""
        return next((p.element_size() for p in self.model.parameters() if not p.requires_grad), 0)

    def trained_itemsize(self) -> int:
        """Bytes that a checkpoint holds for each element of the weights that are trained."""
        moments = 0 if self._pieces else len(MOMENTS)
        return 4 * (1 + moments + self.keeps_average)

    def replicated(self) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) of the optimizer's state that is equal on all ranks: Adafactor's factors."""
        return [
            (f"{key}/{piece.name}", moment)
            for piece in self._pieces.values()
            if len(piece.shape) > 1
            for key, moment in piece.moments.items()
        ]

    def optimizer_steps(self) -> int:
        """The optimizer's step count, of what is trained from the first step on."""
        return self._steps_from().get(1, 0)

    def unfrozen_steps(self) -> dict[str, int]:
        """Step that unfreezes parameters -> the optimizer's step count of these."""
        return {str(start): steps for start, steps in self._steps_from().items() if start > 1}

    def _steps_from(self) -> dict[int, int]:
        """First step of parameter groups -> their step count."""
        found: dict[int, int] = {}
        for flat, start in self._starts():
            step = self.optimizer.state[flat].get("step")
            found[start] = 0 if step is None else int(step)
        return found

    def _starts(self) -> Iterator[tuple[torch.Tensor, int]]:
        """(flat tensor, the first step that trains it)."""
        groups = self._zero.sub_group_to_group_id if self.stage == 3 else None
        for index, flat in enumerate(self._flat_groups()):
            group = self.optimizer.param_groups[groups[index] if groups else index]
            yield flat, group.get(FROM_STEP, 1)

    def finish_loading(self, optimizer_steps: int, unfrozen_steps: Mapping[str, int]) -> None:
        """After the slices were written to: set step counts and refresh every copy made from the masters."""
        for flat, start in self._starts():
            self.optimizer.state[flat]["step"].fill_(float(unfrozen_steps.get(str(start), optimizer_steps)))
        self._refresh()

    def _refresh(self) -> None:
        """Make every copy of the weights anew from the masters."""
        zero = self._zero
        if self.stage == 3:
            # a pass without a backward one leaves parameters gathered, as they were
            zero._partition_all_parameters()
            # exactly what DeepSpeed does after an optimizer step: 16-bit pieces, then the full copies of small
            # (persistent) parameters, then hpZ's secondary pieces
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            persistent = list(zero.persistent_parameters)
            if persistent:
                persistent[0].all_gather(persistent)
            zero.invalidate_secondary_tensor()
        else:
            zero.update_lp_params()

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _flat_groups(self) -> list[torch.Tensor]:
        zero = self._zero
        for attribute in (
            "fp32_partitioned_groups_flat",  # stage 3
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition",  # stage 1 in bf16 with fp32 accumulation
        ):
            if hasattr(zero, attribute):
                return list(getattr(zero, attribute))
        raise RuntimeError(f"unknown ZeRO optimizer {type(zero).__name__}")

    def _lay_out(self, optimizer: Adafactor) -> None:
        """Tell Adafactor what its flat tensors hold (ZeRO-3)."""
        found: dict[int, list[Piece]] = {}
        flats = self._flat_groups()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                shape = whole_shape(parameter)
                offset, length = self._cut(math.prod(shape))
                group, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
                self._pieces[name] = make_piece(name, shape, start, offset, length, flats[group].device)
                found.setdefault(group, []).append(self._pieces[name])
        for group, pieces in found.items():
            optimizer.lay_out(flats[group], pieces)

    def _ensure_moments(self) -> None:
        """An optimizer creates its state at the first step; a checkpoint may be loaded before it."""
        for flat in self._flat_groups():
            state = self.optimizer.state[flat]
            if "step" not in state:
                fused = bool(self.optimizer.defaults.get("fused"))
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
                for key in () if self._pieces else MOMENTS:
                    made = self._states.zeros(flat.numel(), flat.dtype) if self._states else torch.zeros_like(flat)
                    state[key] = made.detach()

    def _cut(self, numel: int) -> tuple[int, int]:
        """(offset, length) of this rank's slice of a parameter that ZeRO-3 has cut, or that all ranks have whole."""
        piece = math.ceil(numel / self.world_size)
        offset = min(self.rank * piece, numel)
        return offset, min(piece, numel - offset)

    def _zero3_shard(self, name: str, parameter: Any) -> Shard:
        numel = int(parameter.ds_numel)
        offset, length = self._cut(numel)
        if not parameter.requires_grad:
            return Shard(name, numel, offset, length, {"frozen": parameter.ds_tensor.data.view(-1)[:length]})
        group, start, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return Shard(name, numel, offset, length, self._views(name, group, start, length))

    def _fragment_shard(self, name: str, parameter: Any, to_load: bool) -> Shard | None:
        numel = parameter.numel()
        if not parameter.requires_grad:
            offset, length = (0, numel) if to_load else self._cut(numel)
            return Shard(name, numel, offset, length, {"frozen": parameter.data.view(-1)[offset : offset + length]})
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        where = mapping.get_hp_fragment_address()
        offset = int(mapping.lp_fragment_address.start)
        views = self._views(name, mapping.param_group_index, where.start, where.numel)
        return Shard(name, numel, offset, where.numel, views)

    def _views(self, name: str, group: int, start: int, length: int) -> dict[str, torch.Tensor]:
        flat = self._flat_groups()[group]
        views = {"master": flat.detach().narrow(0, start, length)}
        if self._average:
            views["ema"] = self._average[group].narrow(0, start, length)
        if self._pieces:
            moments = self._pieces[name].moments
            return views | ({"variance": moments["variance"]} if "variance" in moments else {})
        state = self.optimizer.state[flat]
        return views | {key: state[key].narrow(0, start, length) for key in MOMENTS}
