"""A job for the tests: the supervisor over SLURM's backend, with ranks that all-reduce in place of training.

`python reduced.py RUN_DIR NODES PROCESSES [SECONDS [MIN_NODES]]` supervises; as `trainer.agent --worker-module reduced`
it is a rank, which adds up the ranks' numbers over gloo, once and then every 50 ms until SECONDS (over all
starts) have passed or a stop request.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from trainer import heartbeat
from trainer.processes import kill_all
from trainer.rundir import RunDirectory, append_line, write_json


def supervise(folder: str, nodes: str, processes: str, seconds: str = "0", min_nodes: str = "") -> int:
    from launcher import membership
    from launcher.backends.slurm import SlurmBackend
    from launcher.requeue import continue_job, exit_code
    from launcher.supervisor import Supervisor
    from trainer.config.schema import ResilienceConfig, SlurmCluster
    from trainer.lease import acquire

    run = RunDirectory(Path(folder))
    run.path.mkdir(parents=True, exist_ok=True)
    values = {"backend": "slurm", "nodes": int(nodes), **json.loads(os.environ.get("REDUCED_CLUSTER", "{}"))}
    cluster = SlurmCluster.model_validate(values)
    environment = {"REDUCED_SECONDS": seconds, "OMP_NUM_THREADS": "1"}
    backend = SlurmBackend(run, cluster, int(processes), environment, worker_module="reduced")
    with acquire(run.lock_dir) as lease:
        supervisor = Supervisor(run, backend, ResilienceConfig(max_restarts=2, exclude_stragglers=True), lease)
        if min_nodes:
            membership._LOOK_SECONDS = 2.0
            sizes = range(int(min_nodes), int(nodes) + 1)
            plans = {n: {"nodes": n, "world_size": n, "batch": {"micro_batches_per_rank": 12 // n}} for n in sizes}
            write_json(run.plan_path, plans[int(nodes)])
            supervisor.membership = membership.Membership(run, backend, plans)
            backend.pool.sizes, backend.resize = sizes, supervisor.membership.take
        continue_job(supervisor, backend)
        action = supervisor.supervise().action
    return exit_code(action, run, cluster, 24.0)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def train(run: RunDirectory, attempt: int) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    done = run.path / "done"  # how many rounds have been made: a checkpoint of sorts
    events = run.event_writer(f"rank{rank}", attempt)
    rounds, spent = map(float, done.read_text().split()) if done.exists() else (0, 0.0)
    begin = time.monotonic() - spent
    deadline = begin + float(os.environ["REDUCED_SECONDS"])
    for step in range(int(rounds), 10**9):
        # sum of the ranks' numbers, and how many of them have seen a stop request or the end
        ends = run.stop_request(attempt) is not None
        value = torch.tensor([rank + 1.0, float(ends), float(time.monotonic() > deadline)])
        dist.all_reduce(value)
        assert value[0].item() == world_size * (world_size + 1) / 2
        if rank == 0:
            if step == int(rounds):
                events.write("first_step", step=step + 1)
            line = {"step": step + 1, "loss": 1.0, "time": time.time(), "step_seconds": 0.05, "total_steps": 1_000_000}
            append_line(run.metrics_path, line)
        if step % 100 == 0:  # what trainer.stragglers would measure
            heartbeat.note_probe(0.05 if os.environ["SLURMD_NODENAME"] == os.environ.get("REDUCED_SLOW_NODE") else 0.01)
        if os.environ["SLURMD_NODENAME"] == os.environ.get("REDUCED_BAD_NODE"):
            kill_all([parent_of(os.getppid())])  # the node's end of the link, which takes its agent and ranks along
        if value[1] or value[2]:
            dist.barrier()
            if rank == 0:
                done.write_text(f"{step + 1} {time.monotonic() - begin}")
            events.write("stopped" if value[1] else "trained", rounds=step + 1)
            break
        time.sleep(0.05)
    note = {"rank": rank, "node": os.environ["SLURMD_NODENAME"], "interface": os.environ["GLOO_SOCKET_IFNAME"]}
    note |= {name: os.environ.get(name) for name in ("MASTER_ADDR", "HOSTILE", "PASSED_TOKEN")} | {"attempt": attempt}
    note["prefix"] = sys.prefix
    note["cpus"] = sorted(os.sched_getaffinity(0))
    append_line(run.path / f"notes{rank}.jsonl", note)
    dist.destroy_process_group()


if __name__ == "__main__":
    if "--run-dir" in sys.argv:
        from trainer.worker import main

        sys.exit(main(train=train))
    print(json.dumps(sys.argv[1:]))
    sys.exit(supervise(*sys.argv[1:]))
