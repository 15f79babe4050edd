"""Starts and watches the ranks of one node: torchrun's elastic agent through its API.

    python -P -m trainer.agent --run-dir DIR --attempt N [--hold] -- --nproc-per-node 2 [torchrun arguments]

It differs from the `torchrun` command where a supervisor needs it to: ranks are killed within half a second of the
first failure instead of 30 s, it notes which rank failed first and which it killed itself, it dies with its parent,
and with `--hold` it waits for the line "go" on stdin, so that its import of torch runs beside the launcher's checks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.binding import divide_node
from trainer.failures import EXIT_DONE, EXIT_FAILED, EXIT_TERMINATED, classify, exit_code_of, node_name
from trainer.health import check_node
from trainer.heartbeat import STACK_SIGNAL
from trainer.kernel_log import read_kernel_log, since_boot, telling
from trainer.processes import RUN_VARIABLE, die_with_parent, oom_kills
from trainer.rundir import RunDirectory, read_json, write_json
from trainer.worker import AGENT_PID_VARIABLE, write_output_to

UMASK_VARIABLE = "DSFT_UMASK"  # of the agent and its ranks, in octal digits

# After the first failure the other ranks get this long to fail by themselves: their records help to tell what happened.
_VICTIM_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ranks of this node; 0 if all ended well, else the first failing rank's code (128 + signal)."""
    parser = argparse.ArgumentParser(prog="trainer.agent")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, help="exit unless this is the parent: a launcher, that stops it")
    parser.add_argument("--hold", action="store_true", help='start the ranks after the line "go" on stdin')
    parser.add_argument("--worker-module", default="trainer.worker")
    parser.add_argument("torchrun", nargs="*", help="after --: --nnodes, --nproc-per-node, --node-rank, ...")
    options = parser.parse_args(arguments)
    ranks = _torchrun_parser().parse_args(options.torchrun)
    die_with_parent(options.parent_pid)
    if options.parent_pid is not None:
        # SLURM sends TERM, other schedulers too, and systemd TERM and HUP, to every process of a job, a service or a
        # login session that is to end. The stop goes through the launcher and a last checkpoint instead.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # inherited by ranks
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    signal.signal(STACK_SIGNAL, signal.SIG_IGN)  # until there are ranks
    run = RunDirectory(options.run_dir)
    if umask := os.environ.get(UMASK_VARIABLE):  # srun and ssh bring their own
        os.umask(int(umask, 8))
    write_output_to(run.agent_log_path(options.attempt, node_name()))
    os.environ[AGENT_PID_VARIABLE] = str(os.getpid())
    os.environ[RUN_VARIABLE] = str(run.path)
    os.environ["PYTHONSAFEPATH"] = "1"  # a trainer.py or torch.py in the user's folder is not ours
    os.environ.pop("PYTHONOPTIMIZE", None)  # see child_environment, which not every backend comes through
    for name, value in divide_node(ranks.nproc_per_node, os.environ).items():
        os.environ.setdefault(name, value)
    report = Report()
    oom_kills_before, began = oom_kills(), since_boot()
    try:
        from trainer.elastic import run_ranks

        check_node(
            read_json(run.config_path) or {},
            (read_json(run.plan_path) or {}).get("device", "cpu"),
            ranks.nproc_per_node,
        )
        if options.hold and sys.stdin.readline().strip() != "go":
            return EXIT_DONE

        def report_kernel() -> None:  # in a hang: this process is killed soon
            report.kernel = telling(read_kernel_log(), began)
            with contextlib.suppress(OSError):
                report.write(run.agent_report_path(options.attempt, node_name()))

        worker = ["-P", "-m", options.worker_module, "--run-dir", str(run.path), "--attempt", str(options.attempt)]
        run_ranks(ranks, [sys.executable, *worker], _VICTIM_SECONDS, report, report_kernel)
        code = report.exit_code()
    except BaseException as error:
        stopped = type(error).__name__ == "SignalException"  # how torch says that this process was told to stop
        report.message = f"stopped by {signal.Signals(error.sigval).name}" if stopped else str(error)  # type: ignore[attr-defined]
        report.failure_class = None if stopped else classify(error)
        report.unfit = getattr(error, "unfit", False)
        code = EXIT_TERMINATED if stopped else exit_code_of(error)
        if not stopped:
            traceback.print_exc()
    report.oom_kills = oom_kills() - oom_kills_before
    if (first := report.first_failed()) is not None:
        print(f"rank {first} failed first, with exit code {report.exit_codes[first]}; killed: {sorted(report.killed)}")
        report.kernel = telling(read_kernel_log(), began)
    report.write(run.agent_report_path(options.attempt, node_name()))
    return code


def _torchrun_parser() -> argparse.ArgumentParser:
    """The arguments of torchrun that a plan uses, under torchrun's names."""
    parser = argparse.ArgumentParser(prog="torchrun")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=0, help="0: a free one, for a single node")
    parser.add_argument("--rdzv-id", default="dsft")
    parser.add_argument("--max-restarts", type=int, choices=[0], default=0, help="restarts are the supervisor's")
    return parser


@dataclass
class Report:
    """What became of the ranks of this node (`attempts/NNNN/agents/<node>.json`)."""

    exit_codes: dict[int, int] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    killed: list[int] = field(default_factory=list)
    message: str | None = None
    failure_class: str | None = None
    unfit: bool = False  # the node should not have ranks before somebody has looked at it
    oom_kills: int = 0  # by the kernel, for memory, while they ran
    kernel: list[str] = field(default_factory=list)  # its messages about GPUs and memory meanwhile

    def note(self, rank: int, code: int) -> None:
        """Rank `rank` has been seen to have ended by itself."""
        if rank not in self.exit_codes:
            self.exit_codes[rank] = code
            self.ended[rank] = time.time()

    def first_failed(self) -> int | None:
        """The rank seen to fail first; a death by signal comes before an exit seen in the same poll."""
        failed = [rank for rank, code in self.exit_codes.items() if code != 0 and rank not in self.killed]
        return min(failed, key=lambda rank: (self.ended[rank], self.exit_codes[rank] > 0, rank), default=None)

    def exit_code(self) -> int:
        first = self.first_failed()
        if first is None:
            return EXIT_DONE if all(code == 0 for code in self.exit_codes.values()) else EXIT_FAILED
        code = self.exit_codes[first]
        return code if code > 0 else 128 - code

    def write(self, path: Path) -> None:
        value: dict[str, Any] = {
            "node": node_name(),
            "exit_codes": {str(rank): code for rank, code in sorted(self.exit_codes.items())},
            "ended": {str(rank): when for rank, when in sorted(self.ended.items())},
            "killed_ranks": sorted(self.killed),
            "first_failed_rank": self.first_failed(),
            "oom_kills": self.oom_kills,
            "kernel": self.kernel,
            "class": self.failure_class,
            "unfit": self.unfit,
            "message": self.message,
            "time": time.time(),
        }
        path.parent.mkdir(exist_ok=True)
        write_json(path, value)


if __name__ == "__main__":
    sys.exit(main())
