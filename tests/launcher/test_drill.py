"""`dsft drill` on a real run of two ranks: it recovers, people are told, and every second of it is accounted for."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_launch import config_file, dsft, folder, start, wait_for  # noqa: F401
from test_notify import server  # noqa: F401
from test_supervisor import Launch, agent_of

from launcher.drill import inject
from launcher.goodput import failure_times
from trainer.failures import UserError
from trainer.processes import kill_run, processes_of_run
from trainer.rundir import RunDirectory, write_json

pytestmark = pytest.mark.faults


def test_a_rank_killed_by_a_drill(
    folder: Path,  # noqa: F811
    server: tuple[str, list[dict[str, Any]]],  # noqa: F811
) -> None:
    url, posted = server
    program = "import os, sys; open(sys.argv[1], 'a').write(os.environ['DSFT_EVENT'] + sys.stdin.read() + '\\n')"
    config = config_file(folder, "drilled", max_steps=30)
    value = json.loads(config.read_text())
    value["resilience"] = {
        "notify": [
            {"webhook": "$SITE_HOOK"},
            {"command": [sys.executable, "-c", program, "told.txt"], "events": ["end"]},
            {"command": ["/does/not/exist"], "events": ["end"]},
        ]
    }
    write_json(config, value)
    began = time.time()
    process = start(folder, "launch", str(config), "--json", SITE_HOOK=f"{url}/ok/secret-of-the-site")
    run = RunDirectory(folder / "runs" / "drilled")
    wait_for(run.metrics_path.exists)
    arguments = ("drill", str(run.path), "--fault", "kill-rank", "--rank", "1", "--after-step", "8")
    code, _, errors = dsft(folder, *arguments)
    assert (code, "--yes" in errors) == (2, True)
    code, output, errors = dsft(folder, *arguments, "--yes", "--json")
    assert code == 0, errors
    drill = json.loads(output)
    assert drill["step"] >= 8
    output, errors = process.communicate(timeout=300)
    outside = time.time() - began
    assert process.returncode == 0, errors
    report = json.loads(output)
    assert (report["state"], report["steps"]) == ("finished", 30)

    failure = report["failures"][0]
    assert (failure["rank"], failure["injected"]) == (1, "kill-rank")
    assert 0 < failure["detection_seconds"] <= 5.0
    goodput = report["goodput"]
    start_up = goodput["seconds"]["start"] + goodput["seconds"]["load"]  # of two attempts
    assert 0 < failure["recovery_seconds"] < start_up + 2.0
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_seconds"], rel=1e-9)
    written = (run.path / "report.html").stat().st_mtime - began  # the last thing of a launch before its own report
    assert goodput["wall_seconds"] == pytest.approx(written, rel=0.01, abs=0.3)
    assert goodput["wall_seconds"] < outside
    # a rank killed right after a save, before another step, costs none twice
    made = [line["step"] for line in map(json.loads, run.metrics_path.read_text().splitlines()) if "loss" in line]
    assert (goodput["seconds"]["repeated"] > 0) == (len(made) > len(set(made)))
    assert "kill-rank" in (run.path / "report.html").read_text()

    assert [message["event"] for message in posted] == ["failure", "recovery", "end"]
    assert posted[0]["rank"] == 1
    assert posted[2]["state"] == "finished"
    told = (folder / "told.txt").read_text()
    assert told.startswith("end{")
    assert (
        "resilience.notify.2 was not told of `end`: No such file or directory"
        in (run.events_dir / "notify.jsonl").read_text()
    )
    assert not any(b"secret-of-the-site" in path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    assert processes_of_run(run.path) == []


def test_every_fault_hits_what_it_says(tmp_path: Path) -> None:
    """With small ranks under the real agent and supervisor."""
    run = RunDirectory(tmp_path / "runs" / "r")
    launch = Launch(run, "stoppable")
    try:
        wait_for(lambda: run.attempts() == [1])
        assert launch.pid_of("pid0") != launch.pid_of("pid1")  # both are there
        with pytest.raises(UserError, match="no rank 7 in attempt 1; its ranks: 0, 1"):
            inject(run, "kill-rank", 7, None)
        stopped = inject(run, "stop-rank", 1, 1)
        assert stopped["pid"] == launch.pid_of("pid1")
        wait_for(lambda: Path(f"/proc/{stopped['pid']}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        os.kill(stopped["pid"], signal.SIGCONT)

        agent = agent_of(launch.pid_of("pid0"))  # its ranks have another parent as soon as it is gone
        assert inject(run, "kill-agent", 0, None)["pid"] == agent
        wait_for(lambda: run.attempts() == [1, 2])
        wait_for(lambda: failure_times(run.merged_events()))
        found = failure_times(run.merged_events())[1]
        assert found["injected"] == "kill-agent"
        assert 0 < found["detection_seconds"] < 5

        event = inject(run, "kill-supervisor", 0, None)
        assert (event["attempt"], event["pid"]) == (2, launch.process.pid)
        assert launch.process.wait(10) == -signal.SIGKILL
        wait_for(lambda: not processes_of_run(run.path))
        with pytest.raises(UserError, match="is not running"):
            inject(run, "kill-rank", 0, None)
        assert [e["fault"] for e in run.merged_events() if e["event"] == "drill"] == [
            "stop-rank",
            "kill-agent",
            "kill-supervisor",
        ]
    finally:
        if launch.process.poll() is None:
            os.killpg(launch.process.pid, signal.SIGKILL)
        launch.process.communicate()
        kill_run(run.path)
