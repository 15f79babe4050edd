"""Classification and actions as pure functions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from launcher.hangs import Hang
from launcher.verdict import GROW, NODE_LOST, Attempt, Snapshot, Verdict, classify, decide
from trainer.failures import FailureClass


def record(rank: int, failure_class: str, time: float, message: str = "m", step: int | None = None) -> dict[str, Any]:
    return {
        "class": failure_class,
        "rank": rank,
        "node": f"n{rank // 2}",
        "step": step,
        "message": message,
        "traceback": "Traceback",
        "time": time,
    }


def agent(node: str, codes: dict[int, int], ended: dict[int, float] | None = None, killed: tuple[int, ...] = ()) -> Any:
    return {
        "node": node,
        "exit_codes": {str(rank): code for rank, code in codes.items()},
        "ended": {str(rank): time for rank, time in (ended or {}).items()},
        "killed_ranks": list(killed),
        "class": None,
        "message": None,
        "time": 100.0,
    }


def test_the_earliest_record_is_the_cause() -> None:
    verdict = classify(
        Snapshot(
            agents={"n0": 1, "n1": 1},
            reports=[agent("n0", {0: 1, 1: 1}), agent("n1", {2: 1, 3: -9}, killed=(3,))],
            records=[record(1, "unknown", 12.0), record(2, "numeric", 10.0, "nan", step=7), record(0, "unknown", 11.0)],
        )
    )
    assert (verdict.failure_class, verdict.rank, verdict.node, verdict.step) == ("numeric", 2, "n1", 7)
    assert verdict.victims == (0, 1, 3)


def test_a_lost_connection_is_never_the_cause_if_there_is_another() -> None:
    reports = [agent("n0", {0: 1, 1: -9}, {0: 10.0, 1: 10.2})]
    snapshot = Snapshot({"n0": 1}, reports, [record(0, "communication", 9.0)], step=4)
    verdict = classify(snapshot)
    assert (verdict.failure_class, verdict.rank, verdict.step, verdict.victims) == ("unknown", 1, 4, (0,))
    assert "SIGKILL" in verdict.message


def test_with_nothing_but_lost_connections_the_first_is_named() -> None:
    records = [record(3, "communication", 8.0), record(0, "communication", 9.0)]
    verdict = classify(Snapshot({"n0": 1}, [agent("n0", {0: 1, 3: 1})], records))
    assert (verdict.failure_class, verdict.rank) == ("communication", 3)


def test_an_abort_follows_from_what_was_told() -> None:
    reports = [agent("n0", {0: -6, 1: 1}, {0: 9.0, 1: 10.0})]
    assert classify(Snapshot({"n0": 1}, reports, [record(1, "data", 9.5)])).rank == 1


def test_a_kill_is_out_of_memory_only_with_the_kernels_word() -> None:
    reports = [agent("n0", {0: -9, 1: -9}, {0: 9.0}, killed=(1,))]
    assert classify(Snapshot({"n0": 137}, reports)).failure_class == "unknown"
    verdict = classify(Snapshot({"n0": 137}, [reports[0] | {"oom_kills": 1}]))
    assert (verdict.failure_class, verdict.rank) == ("out_of_memory", 0)
    assert verdict.evidence


def test_a_broken_gpu_is_its_nodes_failure() -> None:
    xid = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, name=python, GPU has fallen off the bus."
    records = [record(1, "unknown", 9.0, "CUDA error: unspecified launch failure"), record(0, "communication", 8.0)]
    n1 = agent("n1", {1: 1}) | {"kernel": [xid]}
    records[0]["node"] = "n1"
    verdict = classify(Snapshot({"n0": 1, "n1": 1}, [agent("n0", {0: 1}), n1], records))
    assert (verdict.failure_class, verdict.rank, verdict.node) == ("node", 1, "n1")
    assert xid in verdict.message
    assert verdict.evidence == (f"kernel of n1: {xid}",)
    # the program's own fault (31) is evidence, no more
    n1 = agent("n1", {1: 1}) | {"kernel": ["NVRM: Xid (PCI:0000:3b:00): 31, pid=1, name=python, MMU Fault"]}
    verdict = classify(Snapshot({"n1": 1}, [n1], records[:1]))
    assert (verdict.failure_class, len(verdict.evidence)) == ("unknown", 1)
    # its rank was killed before it could say a word: the peers alone told
    verdict = classify(
        Snapshot({"n0": 1, "n1": 1}, [agent("n0", {0: 1}), agent("n1", {}) | {"kernel": [xid]}], records[1:])
    )
    assert (verdict.failure_class, verdict.rank, verdict.node) == ("node", None, "n1")


def test_a_hang_of_a_broken_gpu_is_its_nodes_failure() -> None:
    xid = "NVRM: Xid (PCI:0000:3b:00): {}, pid=1, name=python, GPU has fallen off the bus."
    hang = Hang(70.0, 60.0, (), None, "step", 7, "every rank has entered the same collectives", others=(0, 1))
    reports = [agent("n0", {}), agent("n1", {}) | {"kernel": [xid.format(79)]}]
    verdict = classify(Snapshot({}, reports, hang=hang))
    assert (verdict.failure_class, verdict.rank, verdict.node, verdict.unfit) == ("node", None, "n1", True)
    assert xid.format(79) in verdict.message
    assert "no rank got on for 70 s" in verdict.message
    assert verdict.victims == (0, 1)
    reports[1]["kernel"] = [xid.format(31)]  # a program's fault: shown, whichever node it may have been
    verdict = classify(Snapshot({}, reports, hang=hang))
    assert (verdict.failure_class, verdict.node) == ("hang", None)
    assert verdict.evidence == (f"kernel of n1: {xid.format(31)}",)


def test_an_agent_that_is_gone_without_a_report_is_its_nodes_failure() -> None:
    verdict = classify(Snapshot({"n0": 1, "n1": -9}, [agent("n0", {0: 1})], [record(0, "communication", 9.0)]))
    assert (verdict.failure_class, verdict.node, verdict.rank, verdict.victims) == ("node", "n1", None, (0,))


def test_a_node_whose_link_ended_is_named_whatever_it_reported() -> None:
    reports = [agent("n0", {0: 1}), agent("n1", {1: -9}, {1: 3.0})]
    verdict = classify(Snapshot({"n0": 1, "n1": NODE_LOST}, reports, [record(0, "communication", 2.0)]))
    assert (verdict.failure_class, verdict.node) == ("node", "n1")
    assert verdict.message.startswith("node n1 is gone")


def test_a_verdict_comes_back_from_its_record() -> None:
    verdict = Verdict("failed", "node", None, "n1", 4, "m", "t", (1, 2), ("e",))
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json() | {"action": "retry"}))) == verdict


def test_a_stop_for_more_nodes_is_followed_by_an_attempt_and_costs_no_restart() -> None:
    grown = Attempt(Verdict("stopped", step=9), (9, 9))
    failed = Attempt(Verdict("failed", "node", node="n1", step=12), (9, 12))
    assert decide([grown], 0, GROW).kind == "retry"
    action = decide([grown, failed], 1)
    assert (action.kind, action.reason) == ("retry", "restart 1 of 1")


@pytest.mark.parametrize(("reason", "requeue"), [("time_limit", True), ("preemption", True), ("cancel", False)])
def test_what_is_to_be_requeued(reason: str, requeue: bool) -> None:
    assert decide([Attempt(Verdict("stopped"), (1, 1))], 3, reason).requeue is requeue


def test_an_agents_own_failure_is_told() -> None:
    report = agent("n0", {}) | {"class": "communication", "message": "address in use"}
    verdict = classify(Snapshot({"n0": 75}, [report]))
    assert (verdict.failure_class, verdict.message) == ("communication", "agent: address in use")


def test_a_stop_request_explains_what_it_killed() -> None:
    reports = [agent("n0", {0: 1, 1: -9}, killed=(1,))]
    snapshot = Snapshot({"n0": 1}, reports, [record(0, "communication", 9.0)], stop_reason="cancel")
    assert classify(snapshot).outcome == "stopped"


def test_a_stop_request_that_came_too_late_does_not_undo_the_run() -> None:
    assert (
        classify(Snapshot({"n0": 0}, [agent("n0", {0: 0})], stop_reason="cancel", trained=True)).outcome == "finished"
    )
    assert classify(Snapshot({"n0": 0}, [agent("n0", {0: 0})], stop_reason="cancel")).outcome == "stopped"
    assert classify(Snapshot({}, stop_reason="cancel", trained=True)).outcome == "stopped"  # killed in its export


@pytest.mark.parametrize("code", [0, 143])  # 143: the agent was told to stop, by nobody we know
def test_an_end_in_silence_is_no_success(code: int) -> None:
    verdict = classify(Snapshot({"n0": code}, [agent("n0", {0: 0})], step=5))
    assert (verdict.outcome, verdict.failure_class, verdict.step) == ("failed", "unknown", 5)
    assert f"n0: {code}" in verdict.message
    assert classify(Snapshot({"n0": 0}, [agent("n0", {0: 0})], trained=True)).outcome == "finished"


def failed(
    failure_class: FailureClass, progress: tuple[int, int] = (0, 0), message: str = "m", step: int = 0
) -> Attempt:
    return Attempt(Verdict("failed", failure_class, step=step, message=message), progress)


@pytest.mark.parametrize("failure_class", ["user", "data"])
def test_user_and_data_errors_are_never_retried(failure_class: FailureClass) -> None:
    action = decide([failed(failure_class)], max_restarts=10)
    assert (action.kind, action.exit_code) == ("stop", 2)


@pytest.mark.parametrize(
    ("failure_class", "code"), [("node", 75), ("communication", 75), ("storage", 75), ("unknown", 1)]
)
def test_the_budget_ends(failure_class: FailureClass, code: int) -> None:
    history = [failed(failure_class, (step, step), f"m{step}") for step in range(1, 4)]
    assert decide(history[:2], max_restarts=2).kind == "retry"
    action = decide(history, max_restarts=2)
    assert (action.kind, action.exit_code) == ("stop", code)
    assert "max_restarts" in action.reason


def test_no_restart_is_allowed_where_none_is_configured() -> None:
    assert decide([failed("node")], max_restarts=0).kind == "stop"


def test_without_progress_it_backs_off_and_stops() -> None:
    history = [failed("node", (50, 60)) for _ in range(4)]
    delays = [decide(history[:n], max_restarts=99).delay_seconds for n in (1, 2, 3)]
    assert delays == [0.0, 5.0, 10.0]
    action = decide(history, max_restarts=99)
    assert (action.kind, "without progress" in action.reason) == ("stop", True)


def test_progress_clears_the_back_off() -> None:
    history = [failed("node", (50, 60)), failed("node", (50, 60)), failed("node", (50, 61))]
    action = decide(history, max_restarts=99)
    assert (action.kind, action.delay_seconds) == ("retry", 0.0)


def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time() -> None:
    again = [failed("unknown", step=7), failed("unknown", step=7)]
    assert decide(again, max_restarts=9).kind == "stop"
    assert decide([failed("unknown", step=7), failed("unknown", step=9)], max_restarts=9).kind == "retry"


def test_want_of_memory_is_tried_again_as_long_as_less_is_taken() -> None:
    first, second = (failed("out_of_memory", message=f"{free} MiB are free", step=7) for free in (12, 14))
    action = decide([first, second], max_restarts=9)
    assert (action.kind, "training.micro_batch_size" in action.reason) == ("stop", True)
    assert decide([replace(first, relieved=True), second], max_restarts=9).delay_seconds == 5
    relieved = [replace(attempt, relieved=True) for attempt in (first, second)]
    assert decide(relieved, max_restarts=9).delay_seconds == 0
    assert decide([failed("node", step=7), failed("node", step=7)], max_restarts=9).kind == "retry"


@pytest.mark.parametrize(
    ("reason", "code"), [("interrupt", 130), ("terminate", 143), ("cancel", 143), ("preemption", 75)]
)
def test_stops_end_with_the_code_of_their_reason(reason: str, code: int) -> None:
    assert decide([Attempt(Verdict("stopped"), (0, 0))], 3, reason).exit_code == code
