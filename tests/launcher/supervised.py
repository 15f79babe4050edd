"""Programs for the supervisor's tests: small ranks run by the real agent, and a launcher-like process to kill.

python supervised.py supervise RUN_DIR MODE [RESILIENCE as JSON]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainer.failures import DataError, NumericError
from trainer.rundir import RunDirectory, append_line, write_json

STARTED = time.time()


def train(run: RunDirectory, attempt: int) -> None:
    """What a rank does, by the environment variable MODE."""
    rank, mode = int(os.environ["RANK"]), os.environ["MODE"]
    (run.attempt_dir(attempt) / f"pid{rank}").write_text(str(os.getpid()))
    print(f"rank {rank} runs {mode}")
    match mode:
        case "data" if rank == 1:
            raise DataError("train.jsonl, line 7: no column `question`")
        case "numeric" if rank == 1:
            raise NumericError("loss is nan")
        case "killed" if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "silent" if rank == 1:
            print("a library says goodbye")
            os._exit(7)
        case "flaky" if attempt == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hungry" if attempt == 1 and rank == 1:
            Path(os.environ["MEMORY_GROUP"]).write_text(str(os.getpid()))
            print(len(b"\1" * (64 << 20)))
        case "done" | "flaky" | "hungry" if mode == "done" or attempt == 2:
            if rank == 0:
                run.event_writer("rank0", attempt).write("trained", step=3)
            return
        case "stoppable":
            if rank == 0:
                run.event_writer("rank0", attempt).write("first_step", step=1)
            while run.stop_request(attempt) is None:
                time.sleep(0.02)
            if rank == 0:
                run.event_writer("rank0", attempt).write("stopped", step=1)
            return
        case "grandchild":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
            (run.attempt_dir(attempt) / f"grandchild{rank}").write_text(str(child.pid))
        case "echo":
            _echo(rank)
        case "steps":
            return _steps(run, attempt, rank)
    time.sleep(300)


SAVE_STEPS = 40
_STEP_SECONDS = 0.05


def _steps(run: RunDirectory, attempt: int, rank: int) -> None:
    """Steps and checkpoints without a model, until a stop request."""
    if rank != 0:
        while run.stop_request(attempt) is None:
            time.sleep(_STEP_SECONDS)
        return
    events = run.event_writer("rank0", attempt)
    step = first = max(run.published_checkpoints(), default=0)
    stopped = False
    while not stopped:
        began = time.time()
        time.sleep(_STEP_SECONDS)
        step += 1
        stopped = run.stop_request(attempt) is not None
        line = {"step": step, "loss": 1.0, "time": time.time(), "step_seconds": time.time() - began}
        append_line(run.metrics_path, line)
        if step == first + 1:
            events.write("first_step", step=step, seconds=time.time() - began, data_seconds=0.0)
        if step % SAVE_STEPS == 0 or stopped:
            events.write("checkpoint_started", step=step, stall_seconds=0.0)
            folder = run.checkpoints_dir / f"step-{step:08d}"
            folder.mkdir(parents=True)
            write_json(folder / "manifest.json", {})
            events.write("checkpoint", step=step, seconds=0.0, bytes=0)
    events.write("stopped", step=step)


def _echo(rank: int) -> None:
    """Rank 1 dies while rank 0 waits for it in a collective: rank 0 fails too, because of it."""
    import torch
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))


def supervise(path: str, settings: dict[str, Any]) -> int:
    """What `dsft launch` does after planning."""
    from launcher.backends.local import LocalBackend
    from launcher.supervisor import Supervisor
    from trainer.config.schema import ResilienceConfig
    from trainer.failures import DsftError
    from trainer.lease import acquire

    run = RunDirectory(Path(path))
    run.event_writer("launch").write("launched", started=STARTED)
    resilience = ResilienceConfig(**{"max_restarts": 2, "stop_grace_seconds": 60.0} | settings)
    backend = LocalBackend(run, 2, {"PYTHONPATH": str(Path(__file__).parent)}, worker_module="supervised")
    try:
        with acquire(run.lock_dir, lease_seconds=2.0, renew_seconds=0.3) as lease:
            result = Supervisor(run, backend, resilience, lease).supervise()
    except DsftError as error:
        print(error)
        return error.exit_code
    print(json.dumps(result.verdict.to_json() | {"attempts": result.attempts, "reason": result.action.reason}))
    return result.action.exit_code


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        os.environ["MODE"] = sys.argv[3]
        sys.exit(supervise(sys.argv[2], json.loads(sys.argv[4])))
    from trainer.worker import main

    sys.exit(main(train=train))
