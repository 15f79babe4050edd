"""The arithmetic of a plan: batches, the DeepSpeed JSON, memory, FLOPs."""

import math

import pytest
from config_samples import LLAMA_8B
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.schema import DeepSpeedConfig, ModelConfig
from trainer.failures import UserError
from trainer.planning.batches import choose_micro_batch, cut, plan_batches
from trainer.planning.communication import (
    DEFAULT_BUCKET,
    LARGEST_PREFETCH,
    LARGEST_REDUCE,
    SMALLEST,
    Communication,
    layer_parameters,
    plan_communication,
)
from trainer.planning.deepspeed_config import deepspeed_config
from trainer.planning.memory import CUDA_OVERHEAD, Recomputation, estimate, recomputation
from trainer.planning.model_facts import facts_of_config
from trainer.planning.throughput import flops_per_token, peak_flops

LLAMA = facts_of_config(LLAMA_8B)
LAYER_8B = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 64))
def test_every_sequence_has_a_place_and_no_rank_makes_a_pass_too_many(global_batch, world_size, micro):
    if world_size > global_batch:
        with pytest.raises(UserError, match=f"{world_size} ranks"):
            plan_batches(global_batch, world_size, micro)
        return
    plan = plan_batches(global_batch, world_size, micro)
    slots = world_size * plan.micro_batches_per_rank * micro
    assert slots >= global_batch > slots - world_size * micro
    # deal the micro-batches out, one after the other, as a check on the closed form
    used = math.ceil(global_batch / micro)
    assert plan.idle_micro_batches == world_size * plan.micro_batches_per_rank - used >= 0
    assert 0 <= plan.wasted_share < 1
    assert (plan.wasted_share == pytest.approx(0)) == (plan.suggestions == ())
    for suggestion in plan.suggestions:
        key, value = suggestion.split("=")
        if key == "training.global_batch_size":
            better = cut(int(value), world_size, micro)[2]
        else:
            better = cut(global_batch, world_size, int(value))[2]
        assert better < plan.wasted_share


@given(st.integers(1, 300), st.integers(1, 32), st.integers(1, 64))
def test_the_chosen_micro_batch_wastes_least(global_batch, world_size, largest):
    if world_size > global_batch:
        return
    size = choose_micro_batch(global_batch, world_size, largest)
    assert 1 <= size <= largest
    least = min(cut(global_batch, world_size, other)[2] for other in range(1, largest + 1))
    assert cut(global_batch, world_size, size)[2] <= least + 0.02
    assert cut(global_batch, world_size, 1)[2] >= least


def test_a_batch_by_hand():
    plan = plan_batches(global_batch=20, world_size=3, micro_batch_size=4)
    # 5 micro-batches on 3 ranks: two passes each, the sixth holds nothing; the busiest rank has 8 of 20 sequences
    assert (plan.micro_batches_per_rank, plan.idle_micro_batches) == (2, 1)
    assert plan.wasted_share == pytest.approx(1 - 20 / 24)
    assert plan.suggestions == (
        "training.global_batch_size=12",
        "training.global_batch_size=24",
        "training.micro_batch_size=1",
    )


# -- DeepSpeed ---------------------------------------------------------------------------------------------------------


def ds(config=None, dtype="bfloat16", **section):
    return deepspeed_config(DeepSpeedConfig(config=config or {}, **section), dtype, 2, 4, 1.0)


def test_deepspeed_json():
    config = ds()
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 4)
    assert config["gradient_clipping"] == 1.0
    assert config["zero_optimization"]["stage"] == 3
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert not {"optimizer", "scheduler", "train_batch_size"} & set(config)
    assert "data_types" not in ds(dtype="float32")
    assert ds(offload_optimizer="cpu")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_deepspeed_accepts_it():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 2, 3):
        for offload in ("none", "cpu"):
            section = ds(zero_stage=stage, offload_optimizer=offload)["zero_optimization"]
            known = set(DeepSpeedZeroConfig.model_fields)
            known |= {field.alias for field in DeepSpeedZeroConfig.model_fields.values()}
            assert set(section) <= known
            assert DeepSpeedZeroConfig(**section).stage == stage


def test_raw_deepspeed_config_is_merged():
    config = ds({"zero_optimization": {"sub_group_size": 5, "stage": 3}, "comms_logger": {"enabled": True}})
    assert config["zero_optimization"]["sub_group_size"] == 5
    assert config["zero_optimization"]["reduce_bucket_size"] > 0
    assert config["comms_logger"] == {"enabled": True}


def buckets(nodes, gpus=8, link=450e9, network=50e9, model=LLAMA, memory=80 << 30):
    options = {"link": link, "network": network, "parameter_bytes": 2, "device_memory": memory}
    return plan_communication(model, nodes=nodes, gpus_per_node=gpus, **options)


def test_buckets_follow_latency_and_bandwidth():
    # 0.9 of the bandwidth: n = 9 a W B. Eight H100s: 9 x 5 us x 8 x 450 GB/s = 162 MB
    one = buckets(1)
    assert (one.reduce_bucket, one.prefetch_bucket) == (162_000_000 // 4, LAYER_8B)  # 81M elements would do
    assert "gathered ahead: one layer" in buckets(1, link=200e9).reason
    # eight nodes of 400 Gbit/s: a GPU has 6.25 GB/s; 9 x 15 us x 64 x 6.25 GB/s = 54 MB
    assert buckets(8).reduce_bucket == 54_000_000 // 4
    assert buckets(32).reduce_bucket == 54_000_000
    assert buckets(512).reduce_bucket == LARGEST_REDUCE
    assert buckets(8, network=5e9).reduce_bucket == SMALLEST  # a slow network is soon busy
    assert buckets(8, network=None).reduce_bucket == DEFAULT_BUCKET
    assert "network_gigabits" in buckets(8, network=None).reason
    assert buckets(1, link=None).reduce_bucket == DEFAULT_BUCKET
    assert buckets(1, gpus=1).reduce_bucket == SMALLEST


def test_a_layer_is_gathered_ahead_and_small_gpus_hold_less():
    assert layer_parameters(LLAMA) == LAYER_8B
    assert buckets(8).prefetch_bucket == LAYER_8B < LARGEST_PREFETCH
    small = facts_of_config({**LLAMA_8B, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 8192})
    assert buckets(8, model=small).prefetch_bucket == layer_parameters(small) < LAYER_8B
    assert buckets(1).max_live == 1_000_000_000
    assert buckets(1, memory=16 << 30).max_live == (1 << 30) // 2
    assert buckets(1, model=facts_of_config({"model_type": "rwkv9"})).prefetch_bucket == 81_000_000


def test_what_contradicts_the_plan_is_refused_all_at_once():
    raw = {
        "train_batch_size": 9,
        "optimizer": {"type": "Lamb"},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": False},
    }
    with pytest.raises(UserError) as caught:
        ds(raw)
    for key in ("train_batch_size", "optimizer", "zero_optimization.stage", "bf16"):
        assert f"deepspeed.config.{key}:" in str(caught.value)
    assert "training.global_batch_size" in str(caught.value)


def test_a_raw_config_may_leave_things_to_dsft_but_not_take_them_away():
    left = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"reduce_bucket_size": "auto"},
        "train_batch_size": "auto",
    }
    assert ds(left) == ds({"bf16": {"enabled": True}, "zero_optimization": {}}) == ds()
    for raw, message in (
        ({"zero_optimization": None}, "zero_optimization: found null; expected an object"),
        ({"zero_optimization": {"offload_optimizer": None}}, "offload_optimizer: found null; expected an object"),
        ({"zero_optimization": {"sub_group_size": "1e9"}}, 'sub_group_size: found "1e9" .*; expected a number'),
    ):
        with pytest.raises(UserError, match=message):
            ds(raw, offload_optimizer="cpu")


# -- memory ------------------------------------------------------------------------------------------------------------


WHOLE = Recomputation(1)


def memory(stage=3, world_size=8, micro=1, offload="none", dtype="bfloat16", recompute=WHOLE, **options):
    moved = {"offload_optimizer": offload, "offload_parameters": options.get("offload_parameters", "none")}
    moved["nvme_path"] = options.get("nvme_path")
    zero = ds(zero_stage=stage, dtype=dtype, **moved)["zero_optimization"]
    return estimate(
        LLAMA,
        zero,
        world_size=world_size,
        micro_batch_size=micro,
        sequence_length=options.get("length", 4096),
        dtype=dtype,
        recompute=recompute,
        attention=options.get("attention", "sdpa"),
        device=options.get("device", "cuda"),
        on_disk=DeepSpeedConfig(zero_stage=stage, **moved).on_disk,
    )


def test_states_follow_the_zero_paper():
    """ZeRO, section 3, for N parameters on W ranks: 2N bf16 weights, fp32 gradients, 12N of masters and moments."""
    number = LLAMA.parameters
    one, two, three = memory(1), memory(2), memory(3)
    assert one.parameters == two.parameters == 2 * number
    assert three.parameters == pytest.approx(2 * number / 8, rel=0.01)
    assert one.gradients == 4 * number
    assert two.gradients == three.gradients == pytest.approx(4 * number / 8, abs=8)
    for item in (one, two, three):
        assert item.master_weights + item.optimizer_states == pytest.approx(12 * number / 8, abs=8)
    assert memory(3, world_size=64).total < three.total < two.total < one.total


def test_offload_moves_the_states_to_the_host():
    plain, offloaded = memory(), memory(offload="cpu")
    assert offloaded.optimizer_states == offloaded.master_weights == 0
    # by hand: of 1.0038 billion parameters 4 bytes in one pinned place, once more in those of sub-groups of a billion,
    # and torch takes 4 GiB each for the 3.74 of the first two, and 16 MiB for the last
    share = math.ceil(LLAMA.parameters / 8)
    assert (plain.gradients, share // 10**9, 2**23 < 4 * (share % 10**9) <= 2**24) == (4 * share, 1, True)
    assert offloaded.host_offload == 12 * share + 2 * 2**32 + 2**24
    assert memory(offload="cpu", device="cpu").host_offload == 0  # the same memory


def test_offloaded_parameters_leave_the_small_ones_behind():
    optimizer = memory(offload="cpu")
    zero = ds(offload_optimizer="cpu", offload_parameters="cpu")["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    both = memory(offload="cpu", offload_parameters="cpu")
    moved = optimizer.parameters - 2 * LLAMA.small_parameters
    rounded = 2**31 - 2 * math.ceil(LLAMA.parameters / 8)  # of the trained ones, pinned in one place
    assert both.parameters == 2 * LLAMA.small_parameters
    assert both.host_offload == optimizer.host_offload + moved + rounded
    assert optimizer.total - both.total == moved


def test_what_is_in_files_is_in_no_memory():
    """By hand: masters, moments and their copy for checkpoints, 24 bytes a parameter; gradients stay, 4 bytes."""
    share = math.ceil(LLAMA.parameters / 8)
    path = {"nvme_path": "/x"}
    host = memory(offload="cpu")
    files = memory(offload="nvme", **path)
    assert (files.nvme, files.host_offload, files.host_staging) == (24 * share, 2**32, 0)
    assert files.total == host.total
    moved = host.parameters - 2 * LLAMA.small_parameters
    both = memory(offload="nvme", offload_parameters="nvme", **path)
    assert (both.nvme, both.host_offload) == (files.nvme + moved, 2**32)
    weights = memory(offload="cpu", offload_parameters="nvme", **path)
    assert (weights.nvme, weights.host_offload) == (12 * share + moved, host.host_offload)
    on_cpu, plain = memory(offload="nvme", device="cpu", **path), memory(device="cpu")
    assert (on_cpu.nvme, on_cpu.master_weights, on_cpu.optimizer_states, on_cpu.staging) == (24 * share, 0, 0, 0)
    assert plain.total - on_cpu.total >= 24 * share
    section = ds(offload_optimizer="nvme", offload_parameters="nvme", **path)["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert section["offload_param"] == {"device": "cpu", "pin_memory": False}


def test_a_copy_of_the_weights_in_each_node_takes_its_memory():
    zero = deepspeed_config(DeepSpeedConfig(hpz=True), "bfloat16", 2, 4, 1.0, Communication(hpz=8))["zero_optimization"]
    assert zero["zero_hpz_partition_size"] == 8
    options = {"world_size": 32, "micro_batch_size": 1, "sequence_length": 4096, "dtype": "bfloat16"}
    options |= {"recompute": WHOLE, "attention": "sdpa", "device": "cuda"}
    plain, copied = (estimate(LLAMA, section, **options) for section in ({**zero, "zero_hpz_partition_size": 1}, zero))
    assert copied.parameters - plain.parameters == 2 * math.ceil(LLAMA.parameters / 8)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"offload_optimizer": "nvme"}, "needs `nvme_path`"),
        ({"offload_optimizer": "nvme", "nvme_path": "/x", "zero_stage": 2}, "zero_stage"),
        ({"offload_optimizer": "auto", "nvme_path": "/x", "zero_stage": 1}, "zero_stage"),
        ({"offload_parameters": "nvme", "nvme_path": "/x"}, "offload_optimizer"),
        ({"offload_optimizer": "cpu", "nvme_path": "/x"}, "leave it out"),
        ({"offload_optimizer": "nvme", "nvme_path": "x"}, "pattern"),
        ({"offload_parameters": "cpu"}, "offload_optimizer"),
        ({"offload_parameters": "cpu", "offload_optimizer": "cpu", "zero_stage": 2}, "zero_stage"),
        ({"hpz": True, "zero_stage": 2}, "zero_stage"),
        ({"hpz": True, "offload_parameters": "cpu", "offload_optimizer": "cpu"}, "cannot be offloaded"),
    ],
)
def test_offload_that_cannot_be(section, message):
    with pytest.raises(ValueError, match=message):
        DeepSpeedConfig(**section)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing():
    assert memory(micro=4).activations == 4 * memory().activations
    assert memory(recompute=Recomputation(0)).activations > 8 * memory().activations
    assert memory(attention="eager").activations > memory().activations
    assert memory(dtype="float32").parameters == 2 * memory().parameters
    # 4096 tokens x 128256 words x (2 + 2 + 4 + 4) bytes
    assert memory().logits == 4096 * 128256 * 4 + (3 << 28)


def test_every_kind_of_recomputation_has_its_place():
    """Llama 3 8B (h 4096, 32 layers, 4096 queries, 1024 keys, inner 14336), 4096 tokens in bf16, by hand."""
    kinds = {
        name: recomputation(ModelConfig(path="x", **options))
        for name, options in {
            "none": {"gradient_checkpointing": False},
            "all": {},
            "second": {"gradient_checkpointing": {"every": 2}},
            "selective": {"gradient_checkpointing": "selective"},
            "offloaded": {"activation_offload": True},
        }.items()
    }
    found = {name: memory(recompute=kind).activations for name, kind in kinds.items()}
    ends, layer = 2 * 2 * 4096, 2 * (6 * 4096 + 3 * 5120 + 4 * 14336) + 8 * 4096
    kept = 2 * (3 * 4096 + 2 * 4096 + 2 * 1024 + 2 * 14336)
    assert found["none"] == 4096 * (32 * layer + ends)
    assert found["all"] == 4096 * (32 * 2 * 4096 + layer + ends)
    assert found["second"] == 4096 * (16 * layer + 16 * 2 * 4096 + layer + ends)
    assert found["selective"] == 4096 * (32 * kept + layer + ends)
    assert found["offloaded"] == found["all"] - 4096 * 32 * 2 * 4096
    assert memory(recompute=kinds["offloaded"]).host_offload == 4096 * 32 * 2 * 4096
    on_cpu = memory(recompute=kinds["offloaded"], device="cpu")
    assert (on_cpu.activations, on_cpu.host_offload) == (found["all"], 0)  # the same memory
    shares = [kinds[name].share for name in ("none", "all", "second", "selective")]
    assert shares == [0, 1, 0.5, 0]


def test_components_add_up():
    item = memory()
    states = item.parameters + item.gradients + item.master_weights + item.optimizer_states + CUDA_OVERHEAD
    backward = item.gathered_parameters + item.communication_buffers + item.activations + item.logits
    assert item.total == states + max(backward, item.step)
    assert set(item.components()) == set(item.to_json()) - {"total"}


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def test_flops_by_hand():
    # PaLM 540B, table of appendix B's formula: 6 N + 12 L H Q T
    assert flops_per_token(540_350_000_000, 118, 48 * 256, 2048) == 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A6000", 154.8),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_peaks(name, tera):
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize("name", ["Intel(R) Xeon(R) Platinum 8480+", "NVIDIA RTX A4000", "NVIDIA RTX A1000 Laptop GPU"])
def test_no_peak_is_made_up(name):
    assert peak_flops(name) is None
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
