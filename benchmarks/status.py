"""How long `dsft status` takes with many runs known: python benchmarks/status.py [RUNS]

Makes the run directories in a temporary folder: nine in ten have ended (finished, failed, stopped), the others wait in
the queue (SLURM is asked for these and for failed and stopped ones, if it is there). Prints the median of seven calls.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATES = ["finished"] * 5 + ["failed", "stopped", "stopped", "failed"] + ["submitted"]


def make_runs(folder: Path, count: int) -> None:
    """`count` runs of 200 steps with two checkpoints, registered below `folder`/state."""
    sys.path.insert(0, str(ROOT))
    from launcher.registry import register
    from trainer.rundir import RunDirectory, append_line, write_json

    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    os.fsync = lambda descriptor: None  # only to make them quickly
    steps = "".join(
        json.dumps(
            {
                "time": 2.0,
                "step": step,
                "loss": 1 / step,
                "learning_rate": 1e-4,
                "grad_norm": 1.0,
                "target_tokens": 4096,
            }
            | {"tokens": 8192, "padded_tokens": 9, "step_seconds": 1.5, "progress": step / 100, "total_steps": 200}
        )
        + "\n"
        for step in range(1, 201)
    )
    for index in range(count):
        run = RunDirectory(folder / "runs" / f"run-{index}")
        state = STATES[index % len(STATES)]
        run.events_dir.mkdir(parents=True)
        write_json(run.config_path, {"training": {"max_steps": 200}})
        append_line(
            run.events_dir / "submission.jsonl", {"time": 1.0, "event": "submitted", "job_id": str(1000 + index)}
        )
        register(run)
        if state == "submitted":
            continue
        (run.attempt_dir(1)).mkdir(parents=True)
        for step in (100, 200):
            (run.checkpoints_dir / f"step-{step:08d}").mkdir(parents=True)
            write_json(run.checkpoints_dir / f"step-{step:08d}" / "manifest.json", {})
        append_line(run.events_dir / "supervisor.jsonl", {"time": 2.0, "event": "attempt", "attempt": 1})
        append_line(run.events_dir / "supervisor.jsonl", {"time": 9.0, "event": state, "attempt": 1, "reason": ""})
        run.metrics_path.write_text(steps)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    folder = Path(tempfile.mkdtemp(prefix="status"))
    try:
        make_runs(folder, count)
        command = [sys.executable, "-P", "-m", "launcher", "status"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        seconds = []
        for _ in range(7):
            start = time.monotonic()
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=folder)
            seconds.append(time.monotonic() - start)
        lines = len(done.stdout.splitlines())
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        value = {"runs": count, "lines": lines, "slurm": shutil.which("squeue") is not None}
        value |= {"median_seconds": round(statistics.median(seconds), 3), "slowest_seconds": round(max(seconds), 3)}
        print(json.dumps(value | {"cpu_seconds_each": round((used.ru_utime + used.ru_stime) / len(seconds), 3)}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
