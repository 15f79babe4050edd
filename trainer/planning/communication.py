"""How much ZeRO sends at a time, from the model and the network; pure functions.

A collective of n bytes over W ranks in a ring takes W - 1 hops of a latency a each, and (W - 1) / W * n / B seconds of
bandwidth (Thakur et al. 2005, section 4). It reaches the share e of the bandwidth B where n >= e / (1 - e) * a * W * B:
smaller buckets lose to latency, larger ones only cost memory and start later.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.planning.model_facts import ModelFacts

WANTED_SHARE = 0.9  # of the bandwidth
# Seconds a hop, assumed, not measured: launching a kernel and crossing NVLink or PCIe; InfiniBand or RoCE.
# Ethernet with TCP takes several times as long, and then bandwidth is small.
HOP_IN_NODE, HOP_BETWEEN_NODES = 5e-6, 15e-6
SMALLEST = 5_000_000  # elements
LARGEST_REDUCE, LARGEST_PREFETCH = 100_000_000, 250_000_000  # 0.8 and 0.5 GB in bf16 with fp32 reduction
DEFAULT_BUCKET = 50_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
LIVE_SHARE = 1 / 16  # of the device's memory, at most


@dataclass(frozen=True)
class Communication:
    """Sizes in elements, for the DeepSpeed JSON.

    Attributes:
        reduce_bucket: gradients that are reduced together, in fp32.
        prefetch_bucket: parameters that ZeRO-3 gathers ahead, in the model's dtype.
        max_live: parameters that may lie gathered at a time.
        reason: why these, for people.
        hpz: ranks over which a second copy of the weights is cut, those of a node; 1: there is none.
    """

    reduce_bucket: int = DEFAULT_BUCKET
    prefetch_bucket: int = DEFAULT_BUCKET
    max_live: int = MAX_LIVE_PARAMETERS
    reason: str = "defaults"
    hpz: int = 1


USUAL = Communication()


def layer_parameters(model: ModelFacts) -> int | None:
    """Parameters of one layer, but for norms and biases: projections of attention and MLP."""
    if not model.hidden_size or not model.heads or not model.head_dim:
        return None
    inner = model.intermediate_size or 4 * model.hidden_size
    attention = 2 * (model.heads + (model.kv_heads or model.heads)) * model.head_dim
    return model.hidden_size * (attention + (3 if model.gated else 2) * inner)


def plan_communication(
    model: ModelFacts,
    *,
    nodes: int,
    gpus_per_node: int,
    link: float | None,
    network: float | None,
    parameter_bytes: int,
    device_memory: int | None,
) -> Communication:
    """Bucket sizes for GPUs.

    The prefetch bucket holds at least the next layer, so that its gathering hides behind this layer's computation.

    Args:
        link: bytes/s of a GPU to the others of its node, one direction; None: not known.
        network: bytes/s of a node to the others, one direction; None: not known.
        parameter_bytes: of a parameter on the wire; gradients have 4.
        device_memory: bytes of a GPU; None: not known.
    """
    live = MAX_LIVE_PARAMETERS
    if device_memory is not None:
        live = min(live, int(LIVE_SHARE * device_memory / parameter_bytes))
    ranks = nodes * gpus_per_node
    layer = layer_parameters(model)
    bandwidth = link if nodes == 1 else min(link or network or 0, (network or 0) / gpus_per_node) or None
    if ranks == 1:
        return Communication(SMALLEST, _within(layer or 0, LARGEST_PREFETCH), live, "one rank sends nothing")
    if bandwidth is None:
        unknown = "the GPUs are not known ones" if nodes == 1 else "cluster.network_gigabits is not given"
        prefetch = _within(max(DEFAULT_BUCKET, layer or 0), LARGEST_PREFETCH)
        return Communication(DEFAULT_BUCKET, prefetch, live, f"{unknown}: common sizes, at least a layer ahead")
    hop = HOP_IN_NODE if nodes == 1 else HOP_BETWEEN_NODES
    least = WANTED_SHARE / (1 - WANTED_SHARE) * hop * ranks * bandwidth  # bytes
    reduce = _within(least / 4, LARGEST_REDUCE)
    prefetch = _within(max(least / parameter_bytes, layer or 0), LARGEST_PREFETCH)
    reason = (
        f"{least / 1e6:.3g} MB reach {WANTED_SHARE:.0%} of {bandwidth / 1e9:.3g} GB/s a GPU over {ranks} ranks at "
        f"{hop * 1e6:.0f} us a hop"
    )
    if layer and prefetch == layer:
        reason += "; gathered ahead: one layer"
    return Communication(reduce, prefetch, live, reason)


def _within(elements: float, largest: int) -> int:
    return round(min(max(elements, SMALLEST), largest))
