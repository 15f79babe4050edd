"""Ranks that run out of memory: what the config leaves to the plan is made smaller, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_runs import make_run

from launcher.backends.local import LocalBackend
from launcher.facts import gather_facts
from launcher.plan import make_plan
from launcher.relief import Relief, next_smaller, planned
from launcher.supervisor import Supervisor
from launcher.verdict import Verdict
from trainer.config.schema import LaunchConfig, ResilienceConfig
from trainer.lease import acquire
from trainer.processes import kill_run
from trainer.rundir import RunDirectory, read_json, write_json

HERE = str(Path(__file__).parent)
WIDE = {"model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 16384}
WIDE |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def wide_run(folder: Path, workspace: Path, **training: Any) -> tuple[RunDirectory, LaunchConfig]:
    """A run whose micro-batches of 16 take some 500 MiB of activations."""
    model = {"config": WIDE, "tokenizer": str(workspace / "tokenizer.json"), "dtype": "float32"}
    run = make_run(folder, workspace, 1, model=model, global_batch_size=16, max_steps=2, **training)
    return run, LaunchConfig.model_validate(read_json(run.config_path))


def test_a_rank_without_memory_goes_on_with_smaller_micro_batches(tmp_path: Path, workspace: Path) -> None:
    run, config = wide_run(tmp_path / "run", workspace, micro_batch_size="auto")
    assert read_json(run.plan_path)["batch"]["micro_batch_size"] == 16
    variables = {"PYTHONPATH": HERE, "HEADROOM": str(420 << 20), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    backend = LocalBackend(run, 1, variables, worker_module="limited_worker")
    try:
        with acquire(run.lock_dir, lease_seconds=5.0, renew_seconds=1.0) as lease:
            supervisor = Supervisor(run, backend, ResilienceConfig(), lease, relieve=Relief(config, run, None))
            result = supervisor.supervise()
    finally:
        kill_run(run.path)
    assert result.verdict.outcome == "finished", result
    failures = [verdict for verdict in run.verdicts() if verdict["outcome"] == "failed"]
    assert failures
    assert {failure["class"] for failure in failures} == {"out_of_memory"}
    assert "can't allocate memory" in failures[0]["message"]
    less = [event for event in run.merged_events() if event["event"] == "less_memory"]
    assert [event["was"] for event in less] == [16, 8, 4][: len(failures)]
    size = read_json(run.plan_path)["batch"]["micro_batch_size"]
    assert size == 16 >> len(failures)
    assert [(line["step"], line["target_tokens"] > 0) for line in run.step_lines()] == [(1, True), (2, True)]

    facts = gather_facts(config)
    again = planned(config, facts)  # another launch remembers
    assert (again.batch.micro_batch_size, again.config_hash) == (size, make_plan(config, facts).config_hash)
    given = config.altered(training={"micro_batch_size": 16})
    assert planned(given, facts).batch.micro_batch_size == 16


@pytest.mark.parametrize(
    ("size", "changes", "less"),
    [
        (8, {}, (4, False)),
        (3, {}, (1, False)),
        (1, {}, (1, True)),
        (1, {"recompute": True}, None),
        (8, {"device": "cuda"}, (4, False)),
        (8, {"failure_class": "unknown"}, None),
        (8, {"device": "cuda", "traceback": None}, None),  # the kernel killed it: host memory was full
        (8, {"given": True}, None),
    ],
)
def test_what_is_made_smaller(
    tmp_path: Path, workspace: Path, size: int, changes: dict[str, Any], less: tuple[int, bool] | None
) -> None:
    wanted = size if changes.get("given") else "auto"
    run, config = wide_run(tmp_path / "run", workspace, micro_batch_size=wanted)
    config = config.altered(model={"gradient_checkpointing": "auto"})
    plan = read_json(run.plan_path)
    plan |= {"recompute": changes.get("recompute", False), "device": changes.get("device", "cpu")}
    plan["batch"]["micro_batch_size"] = size
    failure_class = changes.get("failure_class", "out_of_memory")
    verdict = Verdict("failed", failure_class, rank=0, traceback=changes.get("traceback", "Traceback ..."))
    found = next_smaller(config, plan, verdict)
    assert found == (less and {"micro_batch_size": less[0], "recompute": less[1], "was": size})

    write_json(run.plan_path, plan)
    event = Relief(config, run, None)(verdict)
    assert (event and (event["micro_batch_size"], event["recompute"])) == less
    if event:
        run.event_writer("supervisor").write(attempt=1, **event)
        made = planned(config, gather_facts(config))
        assert (made.batch.micro_batch_size, made.recompute) == less
