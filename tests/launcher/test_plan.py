"""The plan as a whole: a pure function of a config and the facts of a machine."""

import json
from dataclasses import replace

import pytest
from config_samples import GIB, H100, LLAMA_8B, facts_of, runnable, write

from launcher.plan import make_plan
from launcher.preflight import preflight, preflight_problems
from trainer.config.loading import load_config
from trainer.failures import UserError


def plan_of(tmp_path, *overrides, gpus=(), memory=64 * GIB):
    config = load_config(runnable(tmp_path), overrides)
    return make_plan(config, facts_of(config, gpus, memory))


def large(*overrides):
    return [f"model.config={json.dumps(LLAMA_8B)}", "model.freeze=[]", "data.sequence_length=4096", *overrides]


def test_the_complete_config(tmp_path):
    plan = plan_of(tmp_path)
    assert (plan.device, plan.world_size, plan.nodes, plan.processes_per_node) == ("cpu", 2, 1, 2)
    # 4096 tokens are 8 sequences of 512; 32 = 2 ranks x 2 x 8
    assert (plan.batch.micro_batch_size, plan.batch.micro_batches_per_rank, plan.batch.wasted_share) == (8, 2, 0)
    assert plan.deepspeed["gradient_accumulation_steps"] == 2
    assert plan.threads_per_rank == 4
    slurm = 'cluster={"backend": "slurm", "nodes": 2, "processes_per_node": 2, "cpus_per_task": 24}'
    assert plan_of(tmp_path, slurm).threads_per_rank == 12  # of the task's, whatever this machine has
    assert plan.warnings == ()
    assert plan == plan_of(tmp_path)


def test_json_holds_what_ranks_read(tmp_path):
    plan = json.loads(json.dumps(plan_of(tmp_path).to_json()))
    assert plan["batch"]["micro_batch_size"] == plan["deepspeed"]["train_micro_batch_size_per_gpu"]
    assert plan["batch"]["micro_batches_per_rank"] == plan["deepspeed"]["gradient_accumulation_steps"]
    assert (plan["device"], plan["world_size"], len(plan["config_hash"])) == ("cpu", 2, 64)
    assert plan["memory"]["total"] > 0
    assert plan["model"]["parameters"] > plan["model"]["trainable_parameters"] > 0
    # 12 bytes for each trained parameter, 2 for a frozen one in bf16
    trained, everything = plan["model"]["trainable_parameters"], plan["model"]["parameters"]
    assert plan["checkpoint_bytes"] == 12 * trained + 2 * (everything - trained)


def test_the_command_is_torchruns(tmp_path):
    from torch.distributed.run import get_args_parser

    (command,) = plan_of(tmp_path, "name=a.b").commands()
    words = command.split()
    assert words[:3] == ["PYTHONSAFEPATH=1", "OMP_NUM_THREADS=4", "DS_ACCELERATOR=cpu"]
    options = get_args_parser().parse_args(words[4:])
    assert (options.nnodes, options.nproc_per_node, options.node_rank, options.max_restarts) == ("1", "2", 0, 0)
    assert (options.module, options.training_script) == (True, "trainer.worker")
    assert options.training_script_args == ["--run-dir", str(tmp_path / "runs/a.b"), "--attempt", "1"]


def test_gpus_are_used_where_there_are_some(tmp_path):
    plan = plan_of(tmp_path, "cluster={}", gpus=(H100,) * 4)
    assert (plan.device, plan.world_size, plan.device_name) == ("cuda", 4, H100.name)
    assert plan.peak_flops == 989.4e12
    assert "DS_ACCELERATOR" not in plan.commands()[0]
    assert plan_of(tmp_path, "cluster={}", "cluster.gpus_per_node=2", gpus=(H100,) * 4).world_size == 2
    assert plan_of(tmp_path, "cluster.gpus_per_node=0", gpus=(H100,)).device == "cpu"


def test_too_few_gpus(tmp_path):
    with pytest.raises(UserError, match=r"processes_per_node is 2, .* there is 1: set cluster.processes_per_node=1"):
        plan_of(tmp_path, gpus=(H100,))
    with pytest.raises(UserError, match="gpus_per_node is 2, but 0 GPUs are usable"):
        plan_of(tmp_path, "cluster.gpus_per_node=2")


def test_more_ranks_than_sequences(tmp_path):
    with pytest.raises(UserError, match="global_batch_size is 32, but there are 33 ranks"):
        plan_of(tmp_path, "cluster.processes_per_node=33", memory=1000 * GIB)


def test_auto_takes_the_largest_micro_batch_that_fits(tmp_path):
    settings = large("cluster={}", "training.global_batch_size=64", "model.gradient_checkpointing=false")
    plan = plan_of(tmp_path, *settings, gpus=(H100,) * 8, memory=1024 * GIB)
    assert plan.memory.total <= 0.9 * plan.device_memory == 0.9 * H100.memory
    assert "largest that fits" in plan.batch.reason
    chosen = plan.batch.micro_batch_size
    with pytest.raises(UserError, match=f"It fits with training.micro_batch_size={chosen}"):
        plan_of(tmp_path, *settings, f"training.micro_batch_size={2 * chosen}", gpus=(H100,) * 8, memory=1024 * GIB)


def test_a_model_that_does_not_fit_and_what_would(tmp_path):
    # 16 bytes a parameter of an 8B model on one GPU are 120 GiB
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, *large("cluster={}"), gpus=(H100,), memory=512 * GIB)
    assert "a GPU has 80.0 GiB" in str(caught.value)
    assert "deepspeed.offload_optimizer=cpu (244 GiB of each node's memory) or 3 GPUs or model" in str(caught.value)
    offload = large("cluster={}", "deepspeed.offload_optimizer=cpu")
    offloaded = plan_of(tmp_path, *offload, gpus=(H100,), memory=512 * GIB)
    assert offloaded.memory.total < H100.memory
    with pytest.raises(UserError, match=r"offloaded optimizer and the copy .* of host memory") as caught:
        plan_of(tmp_path, *offload, gpus=(H100,), memory=64 * GIB)
    way = "deepspeed.offload_optimizer=nvme and deepspeed.nvme_path=FOLDER (179 GiB of each node's disk)"
    assert way in str(caught.value)
    with pytest.raises(UserError, match="a smaller model"):
        plan_of(tmp_path, *large("cluster={}"), memory=8 * GIB)


def test_recomputation_and_offload_are_chosen_by_memory_and_time(tmp_path):
    auto = ["model.gradient_checkpointing=auto", "deepspeed.offload_optimizer=auto", "cluster={}"]
    # 8B on one GPU: the optimizer's 120 GiB go to the host
    plan = plan_of(tmp_path, *large(*auto), gpus=(H100,), memory=512 * GIB)
    assert plan.offload == plan.deepspeed["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "the optimizer is offloaded" in plan.memory_reason
    # of a small node to files, but only where there is a place for them
    disk = 'deepspeed={"offload_optimizer": "auto", "nvme_path": "/disk"}'
    for memory, place in ((512, "cpu"), (64, "nvme")):
        plan = plan_of(tmp_path, *large(auto[0], auto[2], disk), gpus=(H100,), memory=memory * GIB)
        assert plan.offload == place
    assert plan.to_json()["nvme"] == {"path": "/disk", "holds": ("optimizer",)}
    assert "offloaded to /disk" in plan.memory_reason
    with pytest.raises(UserError, match="does not fit"):
        plan_of(tmp_path, *large(*auto), gpus=(H100,), memory=64 * GIB)
    # 32 GPUs: it stays, and activations are kept
    plan = plan_of(tmp_path, *large(*auto), "training.global_batch_size=64", gpus=(H100,) * 32, memory=1024 * GIB)
    assert (plan.offload, plan.recompute) == ("none", False)
    assert "offload_optimizer" not in plan.deepspeed["zero_optimization"]
    # of a micro-batch that would not fit without, they are recomputed
    plan = plan_of(tmp_path, *large(*auto), "training.micro_batch_size=8", gpus=(H100,) * 8, memory=1024 * GIB)
    assert (plan.offload, plan.recompute) == ("none", True)
    assert "they would not fit" in plan.memory_reason
    # nodes that cannot be seen
    plan = plan_of(tmp_path, *large(*auto[:2]), 'cluster={"backend": "slurm", "gpus_per_node": 8}')
    assert (plan.offload, plan.recompute) == ("none", True)


def test_the_stage_of_zero_is_chosen_by_memory_and_time(tmp_path):
    def stage(*overrides, gpus=8, memory=1024):
        settings = large("cluster={}", "deepspeed.zero_stage=auto", "model.gradient_checkpointing=auto", *overrides)
        plan = plan_of(tmp_path, *settings, "training.global_batch_size=64", gpus=(H100,) * gpus, memory=memory * GIB)
        assert f"ZeRO-{plan.deepspeed['zero_optimization']['stage']}" in plan.memory_reason
        return plan.deepspeed["zero_optimization"]["stage"]

    lora = 'model.adapter={"type": "lora"}'
    assert (stage(lora), stage(lora, gpus=1)) == (2, 2)  # 15 GiB of frozen weights on each GPU, none of them gathered
    assert stage(lora, f"model.config={json.dumps(LLAMA_8B | {'num_hidden_layers': 200})}") == 3  # 83 GiB of them
    # gradients of 8 micro-batches are reduced in either stage; ZeRO-3 does it while it computes
    assert stage("training.micro_batch_size=1") == 3
    # other settings want weights that are cut, or leave no time to compare
    assert stage(lora, "training.optimizer={'type': 'adafactor', 'learning_rate': 1e-3}".replace("'", '"')) == 3
    assert stage("deepspeed.offload_optimizer=cpu", gpus=1) == 3
    small = ["model.freeze=[]", "deepspeed.zero_stage=auto"]
    stages = [
        plan_of(tmp_path, *small, f"cluster.processes_per_node={ranks}").deepspeed["zero_optimization"]["stage"]
        for ranks in (1, 2)
    ]
    assert stages == [2, 3]
    unknown = plan_of(tmp_path, *small, 'model.config={"model_type": "bert"}', "cluster.processes_per_node=1")
    assert "ZeRO-2: one rank has all" in unknown.memory_reason
    # who has set it is told that another would do
    whole = ["deepspeed.zero_stage=2", "training.micro_batch_size=1", "model.gradient_checkpointing=true"]
    with pytest.raises(UserError, match=r"It fits with deepspeed\.zero_stage=3$"):
        plan_of(
            tmp_path,
            *large("cluster={}", *whole, f"model.config={json.dumps(LLAMA_8B | {'num_hidden_layers': 160})}"),
            "training.global_batch_size=64",
            gpus=(H100,) * 64,
            memory=4096 * GIB,
        )


def test_each_change_proposed_fits(tmp_path):
    """As `--set` would take them: a config with the change is planned, and no smaller number of nodes is."""
    cluster = 'cluster={"backend": "slurm", "nodes": 1, "gpus_per_node": 2, "gpu_model": "A100"}'
    settings = large(cluster, f"model.config={json.dumps(LLAMA_8B | {'num_hidden_layers': 64})}")
    settings += ["training.global_batch_size=64", "model.gradient_checkpointing=true"]
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, *settings, "training.micro_batch_size=2")
    ways = str(caught.value).partition("It fits with ")[2].split(" or ")
    assert [way.partition("=")[0] for way in ways] == [
        "deepspeed.offload_optimizer",
        "cluster.nodes",
        "model.adapter.type",
    ]
    for way in ways:
        assert plan_of(tmp_path, *settings, "training.micro_batch_size=2", way.partition(" (")[0]).memory
    nodes = int(ways[1].rpartition("=")[2])
    assert nodes > 1
    with pytest.raises(UserError, match="does not fit"):
        plan_of(tmp_path, *settings, "training.micro_batch_size=2", f"cluster.nodes={nodes // 2}")
    # where no single change is enough, pairs are proposed
    settings[-1] = "model.gradient_checkpointing=false"
    with pytest.raises(UserError, match=r"model.gradient_checkpointing=true and deepspeed.offload_optimizer=cpu"):
        plan_of(tmp_path, *settings, "training.micro_batch_size=8")


def test_four_bits_are_proposed_where_an_adapter_is_not_enough(tmp_path):
    """45B parameters on one GPU of 80 GiB: 83 GiB in bf16, 21 in 4 bits."""
    folder = tmp_path / "model"
    write(folder / "config.json", json.dumps({**LLAMA_8B, "num_hidden_layers": 200}))
    write(folder / "model.safetensors", "")
    model = {"path": str(folder), "tokenizer": "data/test_model.model"}
    settings = ["training.micro_batch_size=1", "model.freeze=[]", "cluster={}"]
    for adapter in ({}, {"adapter": {"type": "lora"}}):
        overrides = [f"model={json.dumps({**model, **adapter})}", *settings]
        with pytest.raises(UserError, match=r"It fits with .*model\.adapter\.type=qlora") as caught:
            plan_of(tmp_path, *overrides, gpus=(H100,), memory=512 * GIB)
        assert "type=lora" not in str(caught.value)
        plan = plan_of(tmp_path, *overrides, "model.adapter.type=qlora", gpus=(H100,), memory=512 * GIB)
        assert 21 * GIB < plan.memory.parameters < 25 * GIB
    with pytest.raises(UserError, match="qlora packs"):
        plan_of(tmp_path, f"model={json.dumps({**model, 'path': str(gpt2(tmp_path)), 'adapter': {'type': 'qlora'}})}")


def gpt2(folder):
    write(folder / "gpt2/config.json", json.dumps({"model_type": "gpt2"}))
    return folder / "gpt2"


def test_a_model_that_cannot_be_sized_is_planned_and_said_so(tmp_path):
    plan = plan_of(tmp_path, "model.freeze=[]", 'model.config={"model_type": "rwkv9"}')
    assert plan.memory is None
    assert "rwkv9" in plan.warnings[0]
    assert plan.to_json()["checkpoint_bytes"] is None
    mixing = 'model.config={"model_type": "gpt_oss"}'
    told = [plan_of(tmp_path, mixing, *more).warnings for more in ((), ("data.packing=false",))]
    assert ["see one another" in text for text in map(" ".join, told)] == [True, False]


def test_a_cluster_that_cannot_be_seen(tmp_path):
    plan = plan_of(tmp_path, 'cluster={"backend": "slurm", "nodes": 4, "gpus_per_node": 8}', memory=GIB)
    assert (plan.device, plan.world_size, plan.device_memory) == ("cuda", 32, None)
    assert len(plan.commands()) == 4
    assert "--node-rank=3" in plan.commands()[3]
    assert "not checked" in plan.warnings[0]


def test_warnings(tmp_path):
    warnings = plan_of(
        tmp_path, "training.global_batch_size=3", "data.sequence_length=2048", "data.evaluation=[]"
    ).warnings
    assert any("max_position_embeddings 1024" in text for text in warnings)
    assert any("evaluation.interval_steps: set, but data.evaluation names no data" in text for text in warnings)
    (never,) = plan_of(tmp_path, "evaluation={}", "evaluation.interval_steps=null", "evaluation.patience=2").warnings
    assert "evaluation.patience: without evaluation.interval_steps" in never
    assert any("training.global_batch_size=4" in text for text in warnings)


def test_bfloat16_on_a_cpu_that_cannot_multiply_it_is_warned_of(tmp_path):
    for overrides, warned in ([], True), (["model.dtype=float32"], False), (["cluster.backend=slurm"], False):
        config = load_config(runnable(tmp_path), overrides)
        plan = make_plan(config, replace(facts_of(config), multiplies_bfloat16=False))
        assert any("no instructions for bfloat16" in text for text in plan.warnings) == warned


# -- preflight ---------------------------------------------------------------------------------------------------------


def problems_of(tmp_path, *overrides, **facts):
    config = load_config(runnable(tmp_path), overrides)
    machine = replace(facts_of(config), **facts)
    return preflight_problems(config, make_plan(config, machine), machine)


def test_preflight_lets_the_complete_config_pass(tmp_path):
    assert problems_of(tmp_path) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ('cluster.sbatch={"nodes": 4}', "use cluster.nodes"),
        ("cluster.qos=", "cannot be given to sbatch as --qos"),
        ('cluster.setup=["if true"]', "cluster.setup is not valid shell code"),
        ('cluster.container={"runtime": "apptainer", "image": "docker://a", "arguments": ["--net"]}', "remove it"),
    ],
)
def test_preflight_refuses_what_cannot_stand_in_a_job_script(tmp_path, override, told, monkeypatch):
    job = "cluster.backend=slurm", override
    (problem,) = problems_of(tmp_path, *job)
    assert told in problem
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    assert problems_of(tmp_path, *job) == []  # of the user's own script


def test_preflight_finds_every_missing_or_empty_file(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    problems = problems_of(
        tmp_path,
        "data.train.0.path=nowhere.jsonl",
        "data.evaluation.0.path=*.txt",
        "model.tokenizer=./none",
    )
    assert [problem.split(":")[0] for problem in problems] == [
        "model.tokenizer",
        "data.train.0.path",
        "data.evaluation.0.path",
    ]
    assert "no file matches" in problems[2]
    assert problems_of(tmp_path, "data.train.0.path=org/name")[0].endswith("hub is written hf://org/name")
    assert "is empty" in problems_of(tmp_path, "data.train.0.path=empty.jsonl")[0]
    assert problems_of(tmp_path, "data.train.0.path=data/*.json", "data.evaluation.0.path=data") == []


@pytest.mark.parametrize(
    ("family", "positions", "limit"),
    [("bert", 64, 64), ("bert", 60, 56), ("roberta", 64, 62), ("gpt2", 64, 64), ("gpt2", 100, 64), ("llama", 64, None)],
)
def test_preflight_refuses_more_tokens_than_a_model_has_positions(tmp_path, family, positions, limit):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = json.dumps({"model_type": family, **sizes, "vocab_size": 1000, "max_position_embeddings": positions})
    if family == "gpt2":
        model = model.replace("max_position_embeddings", "n_positions")
    chosen = (f"model.config={model}", "model.freeze=[]")
    if limit is not None:
        assert problems_of(tmp_path, *chosen, f"data.sequence_length={limit}") == []
    problems = problems_of(tmp_path, *chosen, "data.sequence_length=65")
    refused = f"data.sequence_length: {family} has positions for rows of {limit} tokens; lower it to that"
    assert problems == ([] if limit is None else [refused])


def test_preflight_finds_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in problems_of(tmp_path, "output_dir=file")[0]
    assert "no file can be written" in problems_of(tmp_path, "output_dir=/proc/dsft")[0]


def test_preflight_looks_at_the_folder_for_what_is_in_files(tmp_path):
    files = "deepspeed.offload_optimizer=nvme"
    assert problems_of(tmp_path, files, f"deepspeed.nvme_path={tmp_path}") == []
    missing = problems_of(tmp_path, files, f"deepspeed.nvme_path={tmp_path}/none")
    assert missing == [f"deepspeed.nvme_path: {tmp_path}/none is no folder; name one on the node's own disk"]


def test_preflight_finds_models_without_products_in_8_bits(tmp_path):
    eight_bits = ("model.fp8=rowwise", "model.compile=true")
    assert problems_of(tmp_path, *eight_bits, 'model.freeze=["layers:1-"]') == []
    for change in ('model.freeze=["layers:0-"]', "model.config.hidden_size=72", 'model.config={"model_type": "gpt2"}'):
        (problem,) = problems_of(tmp_path, *eight_bits, "model.freeze=[]", change)
        assert problem.startswith("model.fp8: no matrix of the model's layers is trained")
    unknown = 'model.config={"model_type": "bert"}'  # the ranks will see
    assert problems_of(tmp_path, *eight_bits, "model.freeze=[]", unknown) == []


@pytest.mark.parametrize(
    ("name", "has_them"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA RTX 6000 Ada Generation", True),
        ("NVIDIA L4", True),
        ("MI300A", True),
        ("A100", False),
        ("nvidia_a100", False),
        ("NVIDIA RTX A6000", False),
        ("Tesla V100S-PCIE-32GB", False),
        ("rtx_3090", False),
        ("MI250X", False),
    ],
)
def test_preflight_finds_gpus_without_products_in_8_bits(tmp_path, name, has_them):
    cluster = {"backend": "slurm", "time": "1:00:00", "gpus_per_node": 2, "gpu_model": name}
    eight_bits = ("model.fp8=rowwise", "model.compile=true", f"cluster={json.dumps(cluster)}")
    problems = problems_of(tmp_path, *eight_bits)
    missing = [f"model.fp8: {name} has no products in 8 bits (Ada, Hopper and later have); set it to none"]
    assert problems == ([] if has_them else missing)
    wide = problems_of(tmp_path, *eight_bits, "model.dtype=float32")
    assert wide == [*problems, "model.fp8: on GPUs it needs model.dtype bfloat16"]


def test_preflight_finds_a_disk_that_is_too_small(tmp_path):
    config = load_config(runnable(tmp_path))
    plan = make_plan(config, facts_of(config))
    # three checkpoints while two are kept, and the export in bf16
    needed = 3 * plan.checkpoint_bytes + 2 * plan.model.parameters
    assert problems_of(tmp_path, disk_free=needed) == []
    (problem,) = problems_of(tmp_path, disk_free=needed - 1)
    assert "checkpoint.keep_last" in problem
    old = tmp_path / "runs/gsm8k-sft/checkpoints/step-00000001/rank0.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(10))
    assert problems_of(tmp_path, disk_free=needed - 10) == []


def test_preflight_raises_with_all_of_them(tmp_path):
    config = load_config(runnable(tmp_path), ["data.train.0.path=a", "data.evaluation.0.path=b"])
    facts = facts_of(config)
    with pytest.raises(UserError, match="2 things to change") as caught:
        preflight(config, make_plan(config, facts), facts)
    assert "data.train.0.path" in str(caught.value)
    assert "data.evaluation.0.path" in str(caught.value)
