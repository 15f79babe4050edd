"""What a rank keeps in memory, in bytes: an estimate from shapes, made before anything is started.

The states follow Rajbhandari et al. 2020 (ZeRO, section 3) with DeepSpeed's buffers; the activations follow Korthikanti
et al. 2022 (section 4), rewritten for gated MLPs, grouped queries and attention kernels that keep no scores.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trainer.config.model import CheckpointedLayers, ModelConfig
from trainer.planning.model_facts import ModelFacts

# A rank before any model: CUDA context, NCCL buffers and allocator slack; on the CPU, the libraries themselves.
CUDA_OVERHEAD = 3 << 29
# Of those that Liger has kernels for, the ones that are built like Llama
FUSED_FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "olmo2", "gemma", "gemma2", "gemma3_text"}
)
# Logits of a block of positions of the fused loss, in elements: matrix products still run at full speed
LOGIT_BLOCK = {"cuda": 1 << 29, "cpu": 1 << 24}
CPU_OVERHEAD = 1 << 29  # measured: 0.47 GiB resident in runs of models of some 100 kB, torch 2.13

Kernels = Literal["own", "fused", "compiled", "fp8"]


@dataclass(frozen=True)
class Recomputation:
    """What layers keep for the backward pass, as `model.gradient_checkpointing` and `activation_offload` say.

    Attributes:
        every: layers 0, every, 2 * every, ... are computed again; 0: none is.
        selective: they keep the results of matrix products and attention besides their input.
        offload: their inputs lie in host memory.
        kernels: of norms, rotary embedding and MLP: the model's ``own``, ``fused`` (Liger's), ``compiled`` layers, or
            such layers with all products in 8 bits (``fp8``).
    """

    every: int
    selective: bool = False
    offload: bool = False
    kernels: Kernels = "own"

    @property
    def share(self) -> float:
        """Share of the forward pass's FLOPs that is computed again; "selective" leaves next to none."""
        return 1 / self.every if self.every and not self.selective else 0.0


def recomputation(model: ModelConfig, fused: bool = False) -> Recomputation:
    """What a config asks for; ``fused``: with Liger's kernels, unless layers are compiled."""
    wanted = model.gradient_checkpointing
    every = wanted.every if isinstance(wanted, CheckpointedLayers) else 1 if wanted else 0
    kernels: Kernels = "fused" if fused else "own"
    if model.compile:
        kernels = "fp8" if model.fp8 in ("rowwise", "tensorwise") else "compiled"
    return Recomputation(every, wanted == "selective", model.activation_offload, kernels)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, on its device. ``host_offload`` (offloaded states, layers' inputs) and ``host_staging`` lie in
    host memory instead and are not part of ``total``; nor is ``nvme``, of files on the node's disk.

    ``total`` counts what lives at the same time at the worst moment: states, overhead, and the larger of the
    backward pass (gathered parameters, buckets, activations, logits) and the optimizer step (``step``). Checkpoints are
    copied into buffers of their own before they are written: ``staging`` on a CPU, ``host_staging`` beside a GPU.
    """

    parameters: int
    gradients: int
    master_weights: int
    optimizer_states: int
    gathered_parameters: int
    communication_buffers: int
    activations: int
    logits: int
    step: int
    overhead: int
    staging: int
    host_offload: int
    host_staging: int
    nvme: int

    @property
    def total(self) -> int:
        states = self.parameters + self.gradients + self.master_weights + self.optimizer_states
        states += self.overhead + self.staging
        backward = self.gathered_parameters + self.communication_buffers + self.activations + self.logits
        return states + max(backward, self.step)

    def components(self) -> dict[str, int]:
        return asdict(self)

    def to_json(self) -> dict[str, int]:
        return {**self.components(), "total": self.total}


def estimate(
    model: ModelFacts,
    zero: dict[str, Any],
    *,
    world_size: int,
    micro_batch_size: int,
    sequence_length: int,
    dtype: str,
    recompute: Recomputation,
    attention: str,
    device: str,
    sequence_parallel: int = 1,
    state_bytes: int = 8,
    fused_loss: bool = False,
    on_disk: Collection[str] = (),
) -> MemoryEstimate | None:
    """The memory of a rank, or None where the model's counts or sizes are not known.

    Args:
        zero: the ``zero_optimization`` section of the DeepSpeed JSON; its buckets are in elements.
        recompute: what layers keep, and what is computed again in the backward pass.
        attention: ``eager`` keeps the scores, [heads, sequence, sequence] of each sequence; the others do not.
        device: ``cuda`` or ``cpu``. On a CPU host and device are the same memory.
        sequence_parallel: ranks that share each sequence; around attention they exchange tokens for heads, as many.
        fused_loss: logits exist a block at a time.
        state_bytes: of each trained parameter besides its fp32 master: Adam's two moments, by default.
        on_disk: ``optimizer`` and ``parameters``, whichever is in files; and what is staged for checkpoints with them.
    """
    if model.parameters is None or model.trainable_parameters is None or model.hidden_size is None:
        return None
    width = 2 if dtype == "bfloat16" else 4
    stage = int(zero["stage"])
    everything, trained = model.parameters, model.trainable_parameters
    held = everything if model.held_elements is None else model.held_elements
    share = math.ceil(trained / world_size)
    whole = held if stage < 3 else math.ceil(held / world_size) + model.small_parameters
    if (node := int(zero.get("zero_hpz_partition_size", 1))) > 1:
        whole += math.ceil(held / node)
    # Gradients are accumulated in fp32: stage 1 keeps whole ones, stages 2 and 3 each rank's share.
    gradients = 4 * (trained if stage == 1 else share)
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    # under ZeRO-3 weights in fp32 are their own masters, where they are in one place
    masters = 0 if width == 4 and stage == 3 and not offloaded else 4 * share
    moments = state_bytes * share
    live = 0
    if stage == 3:
        # What was gathered stays until stage3_max_live_parameters is reached; a layer must fit in any case.
        # What is gathered at a time arrives in one buffer, out of which it is copied.
        limit, ahead = int(zero["stage3_max_live_parameters"]), int(zero["stage3_prefetch_bucket_size"])
        live = width * min(held, max(limit, 2 * (model.largest_block or 0)) + ahead)
        live += width * min(held, ahead) if world_size > 1 else 0
    live += unpacking_bytes(model, width)
    # A bucket is filled in the model's dtype (twice, where it overlaps with the backward pass) and reduced in fp32, in
    # a copy where that is another dtype; one rank makes a copy, too.
    bucket = int(zero["reduce_bucket_size"])
    if device == "cpu":  # allocated whole, but memory that nothing touches costs nothing
        bucket = min(trained, bucket)
    reduced = 4 if width < 4 else 0
    buffers = (
        bucket * (width * (2 if zero.get("overlap_comm") else 1) + reduced) if world_size > 1 else bucket * 2 * width
    )
    # The step flattens the gradients of a sub-group (fp32) and keeps as much for the update.
    step = 8 * min(share, int(zero.get("sub_group_size", share)))
    host = nvme = 0
    if "optimizer" in on_disk:
        nvme = masters + moments
        masters = moments = step = 0
    if device == "cuda" and offloaded:
        # DeepSpeed adds gradients up in one place and copies them to another, which each sub-group has of its own; in
        # files' place one does
        group = int(zero.get("sub_group_size", share)) or 1
        copies = share // group * pinned_bytes(4 * group) + pinned_bytes(4 * (share % group))
        host = masters + moments + pinned_bytes(gradients) + (0 if "optimizer" in on_disk else copies)
        gradients, masters, moments, step = 0, 0, 0, 0
    scales = scale_bytes(model)
    parameters = width * whole + scales
    moved = parameters - width * model.small_parameters - scales  # small ones stay
    if "parameters" in on_disk:
        nvme, parameters = nvme + moved, parameters - moved
    elif device == "cuda" and zero.get("offload_param", {}).get("device", "none") != "none":
        host, parameters = host + moved + pinned_bytes(width * share) - width * share, parameters - moved
    staging = (4 + state_bytes) * share
    staging += 0 if model.pinned else math.ceil(width * (everything - trained) / world_size)
    if on_disk:
        nvme, staging = nvme + staging, 0
    tokens = math.ceil(micro_batch_size * sequence_length / sequence_parallel)
    activations = activation_bytes(model, tokens, sequence_length, width, recompute, attention)
    if recompute.offload and device == "cuda":
        inputs = layer_input_bytes(model, tokens, width, recompute)
        host, activations = host + inputs, activations - inputs
    return MemoryEstimate(
        parameters=parameters,
        gradients=gradients,
        master_weights=masters,
        optimizer_states=moments,
        gathered_parameters=live,
        communication_buffers=buffers,
        activations=activations,
        logits=fused_logit_bytes(model, tokens, width, device) if fused_loss else logit_bytes(model, tokens, width),
        step=step,
        overhead=CUDA_OVERHEAD if device == "cuda" else CPU_OVERHEAD,
        staging=staging if device == "cpu" else 0,
        host_offload=host,
        host_staging=staging if device == "cuda" else 0,
        nvme=nvme,
    )


def pinned_bytes(size: int) -> int:
    """What torch takes of the host's memory for so many bytes that are pinned: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def scale_bytes(model: ModelFacts) -> int:
    """Bytes of what undoes 4 bits, whole on every rank: a byte for 64 weights, and 4 for 256 of those bytes."""
    return math.ceil(model.packed_parameters * (1 / 64 + 4 / (64 * 256)))


def unpacking_bytes(model: ModelFacts, width: int) -> int:
    """Bytes of a matrix as its 4 bits are undone for a product, one at a time: itself and its scales in fp32."""
    return math.ceil(model.largest_packed * (width + 4 / 64))


def layer_bytes_per_token(model: ModelFacts, width: int, kernels: Kernels = "own") -> int:
    """Bytes that one layer keeps for its backward pass, per token, without attention scores.

    In elements of h (hidden), q = heads * head_dim, k = kv_heads * head_dim and i (MLP): the inputs of two norms 2h and
    their normalised fp32 copies (2h of 4 bytes), the inputs of the projections 2h, queries, keys and values q + 2k and
    their rotated copies q + k, the attention's output q, two residual sums 2h, and in the MLP the two projections, the
    activation and their product 4i (3i where it is not gated).

    Liger's kernels keep no copies: a norm its input, the MLP its two projections and their product, and rotation works
    in place. Compiled layers keep as much; with all products in 8 bits, whose factors are cheap to make anew, neither
    normalised inputs nor the MLP's product (all measured: docs/benchmarks.md).
    """
    hidden = model.hidden_size or 0
    head = model.head_dim or 0
    queries, keys = (model.heads or 0) * head, (model.kv_heads or 0) * head
    inner = model.intermediate_size or 4 * hidden
    if kernels == "fp8":
        return width * (2 * hidden + 2 * queries + 2 * keys + (2 if model.gated else 1) * inner)
    if kernels == "compiled" or (kernels == "fused" and model.model_type in FUSED_FAMILIES):
        return width * (4 * hidden + 2 * queries + 2 * keys + (3 if model.gated else 2) * inner)
    elements = 6 * hidden + 3 * queries + 3 * keys + (4 if model.gated else 3) * inner
    return width * elements + 4 * 2 * hidden


def selective_bytes_per_token(model: ModelFacts, width: int) -> int:
    """Bytes that one layer keeps per token under "selective": its input, the results of its matrix products (queries,
    keys, values, the attention's and the MLP's output, the MLP's projections) and the attention's result."""
    hidden, head = model.hidden_size or 0, model.head_dim or 0
    queries, keys = (model.heads or 0) * head, (model.kv_heads or 0) * head
    inner = model.intermediate_size or 4 * hidden
    return width * (3 * hidden + 2 * queries + 2 * keys + (2 if model.gated else 1) * inner)


def layer_input_bytes(model: ModelFacts, tokens: int, width: int, recompute: Recomputation) -> int:
    """Bytes of the inputs of the layers that are computed again."""
    layers = math.ceil((model.layers or 0) / recompute.every) if recompute.every else 0
    return tokens * layers * (model.hidden_size or 0) * width


def activation_bytes(
    model: ModelFacts, tokens: int, sequence_length: int, width: int, recompute: Recomputation, attention: str
) -> int:
    """Bytes of activations of a micro-batch of ``tokens`` tokens: what every layer keeps, and one that is whole again
    while its backward pass runs. Where layers read images, all of them may be tokens of these."""
    tower = 0
    if model.tower is not None:
        patches = model.patches_per_token
        tower = activation_bytes(model.tower, tokens * patches, sequence_length * patches, width, recompute, attention)
    layers, hidden = model.layers or 0, model.hidden_size or 0
    per_token = layer_bytes_per_token(model, width, recompute.kernels)
    if attention == "eager":  # scores in the model's dtype, softmax in fp32 and its cast
        per_token += (model.heads or 0) * sequence_length * (2 * width + 4)
    if not recompute.every:
        kept = layers * per_token
    elif recompute.selective:
        kept = layers * selective_bytes_per_token(model, width) + per_token
    else:
        again = math.ceil(layers / recompute.every)
        kept = (layers - again + 1) * per_token + again * hidden * width
    return tower + tokens * (kept + 2 * hidden * width)  # the embeddings' output and the last norm's


def logit_bytes(model: ModelFacts, tokens: int, width: int) -> int:
    """Bytes of the logits when every token has a label (the worst case): the head's output and its gradient in the
    model's dtype, and the cross-entropy's blocks of rows in fp32 (DeepSpeed's: 256 MiB, up to three at a time; where
    logits are in fp32, one of these is theirs)."""
    elements = tokens * (model.vocabulary or 0)
    return 2 * width * elements + (min(12 * elements, 3 << 28) if width < 4 else min(4 * elements, 2 << 28))


def fused_logit_bytes(model: ModelFacts, tokens: int, width: int, device: str) -> int:
    """As `logit_bytes`, a block at a time (`trainer.loss`), and the gradient of a head that is trained: in fp32, summed
    up over blocks, the last block's, and in the model's dtype."""
    block = min(tokens * (model.vocabulary or 0), LOGIT_BLOCK[device])
    head = (model.vocabulary or 0) * (model.hidden_size or 0) * model.trained_head
    return 2 * width * block + min(12 * block, 3 << 28) + (4 + 2 * width) * head
