"""Less memory for later attempts, where a rank ran out of it and the config leaves it to the plan how much to take.

The micro-batch is halved; at one sequence, activations that were kept are recomputed. Neither changes what is learned:
the global batch stays. Later launches of the run on the same kind of device remember, by the event `less_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.facts import Facts, gather_facts
from launcher.membership import Membership
from launcher.place import plans_of
from launcher.plan import Plan, make_plan
from launcher.state import ledger
from launcher.verdict import Verdict
from trainer.config.schema import LaunchConfig
from trainer.failures import DsftError
from trainer.retry import retried
from trainer.rundir import RunDirectory, read_json, write_json

EVENT = "less_memory"


def planned(config: LaunchConfig, facts: Facts) -> Plan:
    """`make_plan`, with no more than what earlier attempts of the run have left after its ranks ran out of memory."""
    plan = make_plan(config, facts)
    events = ledger(RunDirectory(Path(plan.run_dir)))
    told = [event for event in events if event["event"] == EVENT and event["device"] == plan.device_name]
    if not told or config.training.micro_batch_size != "auto":
        return plan
    return _with_less(config, facts, plan, told[-1])


def _with_less(config: LaunchConfig, facts: Facts, plan: Plan, less: Mapping[str, Any]) -> Plan:
    size = min(int(less["micro_batch_size"]), plan.batch.micro_batch_size)
    found = make_plan(_pinned(config, plan, size, plan.recompute or bool(less["recompute"])), facts)
    batch = replace(found.batch, reason="auto: more has run out of memory")
    return replace(found, batch=batch, config_hash=plan.config_hash)


def _pinned(config: LaunchConfig, plan: Plan, micro_batch_size: int, recompute: bool) -> LaunchConfig:
    """The config with what the plan has chosen; the estimate that it went by was wrong, so it may not choose again."""
    free = config.model.gradient_checkpointing == "auto"
    stage = plan.deepspeed["zero_optimization"]["stage"]
    return config.altered(
        training={"micro_batch_size": micro_batch_size},
        model={"gradient_checkpointing": recompute} if free else {},
        deepspeed={"zero_stage": stage, "offload_optimizer": plan.offload},
    )


@dataclass(frozen=True)
class Relief:
    """What a supervisor asks after each attempt."""

    config: LaunchConfig
    run: RunDirectory
    membership: Membership | None

    def __call__(self, verdict: Verdict) -> dict[str, Any] | None:
        """Plan the next attempts with less memory if one ended for want of it; the event to write of it, or None."""
        plan = read_json(self.run.plan_path) or {}
        less = next_smaller(self.config, plan, verdict)
        if less is None:
            return None
        try:
            facts = gather_facts(self.config)
            new = _with_less(self.config, facts, make_plan(self.config, facts), less).to_json()
            plans = plans_of(self.config, new | {key: plan[key] for key in ("gpus",) if key in plan})
        except (DsftError, OSError):  # the model's files are away: the next attempt tells, and is planned as this one
            return None
        if self.membership is not None:
            self.membership.plans = plans
        nodes = int(plan["nodes"])
        retried(lambda: write_json(self.run.plan_path, plans.get(nodes, plan), indent=2), "plan.json")
        return {"event": EVENT, "device": plan["device_name"], **less}


def next_smaller(config: LaunchConfig, plan: Mapping[str, Any], verdict: Verdict) -> dict[str, Any] | None:
    """{"micro_batch_size", "recompute"} to go on with, and what it "was"; None: this was no want of memory, or there is
    nothing left to the plan."""
    if verdict.failure_class != "out_of_memory" or config.training.micro_batch_size != "auto":
        return None
    if plan["device"] == "cuda" and verdict.traceback is None:  # killed by the kernel: host memory was full
        return None
    size, recompute = int(plan["batch"]["micro_batch_size"]), bool(plan["recompute"])
    if size > 1:
        return {"micro_batch_size": size // 2, "recompute": recompute, "was": size}
    if not recompute and config.model.gradient_checkpointing == "auto":
        return {"micro_batch_size": 1, "recompute": True, "was": 1}
    return None
