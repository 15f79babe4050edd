"""`dsft doctor`: probes on the nodes of a config, asked one thing after another, each for a bounded time."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher.backends.links import address_towards
from launcher.backends.node import LINK_VARIABLE
from launcher.backends.slurm import in_allocation, node_task, step_command, step_environment, step_variables
from launcher.backends.ssh import host_name
from launcher.doctor_checks import (
    clock_problems,
    disk_problems,
    essential_problems,
    gpu_problems,
    needed_paths,
    network_problems,
    reach_problems,
    version_problems,
)
from launcher.doctor_nodes import PROBE, Probes, probes, ssh_probes
from launcher.facts import existing_parent
from slurm.hostlist import expand
from slurm.job import Job, sbatch_options
from trainer.config.schema import LaunchConfig, SlurmCluster
from trainer.failures import UserError, node_name
from trainer.rundir import Json

_START_SECONDS = 60.0
_ANSWER_SECONDS = 30.0
_CLOCK_TRIES = 3
_DISK_BYTES = 256 << 20
_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy")
# Of a job's options, those that srun knows by the same name
_SRUN = (
    "partition",
    "account",
    "qos",
    "constraint",
    "mem",
    "cpus-per-task",
    "gpus-per-node",
    "exclusive",
    "nodelist",
    "exclude",
    "reservation",
)
# Of those that a config may add to a job, what srun refuses to know
_NOT_SRUN = frozenset({"batch", "get-user-env", "ignore-pbs", "kill-on-invalid-dep", "parsable", "wait-all-nodes"})


@dataclass(frozen=True)
class Diagnosis:
    """`nodes`: name -> what is known; `network`: bytes/s; `problems`: a sentence each."""

    nodes: dict[str, Json]
    network: Json
    problems: tuple[str, ...]
    seconds: float

    def to_json(self) -> Json:
        return {"nodes": self.nodes, "network": self.network, "problems": list(self.problems), "seconds": self.seconds}


def examine(config: LaunchConfig, only: Sequence[str], queue_seconds: int, tell: Callable[[str], None]) -> Diagnosis:
    """Examine the nodes of `config` (or only those named); `tell` hears what is being done.

    Raises UserError where nothing can be asked at all.
    """
    started = time.monotonic()
    folder = existing_parent(Path(config.output_dir))
    nonce = secrets.token_hex(8)
    marker = f".dsft-doctor-{nonce}"
    try:
        (folder / marker).write_text(nonce)
    except OSError as error:
        raise UserError(f"output_dir: no file can be written in {folder} ({error.strerror})") from None
    problems: list[str] = []
    try:
        tell("starting probes")
        with _probes(config, only, queue_seconds) as found:
            names = _in_order(config, found)
            if not names:
                raise UserError("no node answers:\n" + "\n".join(f"  {n}: {why}" for n, why in found.absent.items()))
            tell(f"{len(names)} node(s) answer")
            common = {"folder": str(folder), "marker": marker, "paths": needed_paths(config), "packages": _PACKAGES}
            requests = {name: {"do": "facts", "node": name, **common} for name in names}
            facts = found.ask(requests, _ANSWER_SECONDS)
            problems += essential_problems(found, facts, str(folder), nonce)
            problems += version_problems(facts)
            on_cpu = config.cluster.environment.get("DS_ACCELERATOR") == "cpu" or config.cluster.backend == "local"
            problems += gpu_problems(facts, config.cluster.gpus_per_node, on_cpu, idle=True)
            good = [name for name in names if "error" not in facts[name]]
            clocks = {name: offset for name in good if (offset := _clock_offset(found, name)) is not None}
            problems += clock_problems(clocks)
            tell("storage")
            seeing = [name for name in good if facts[name]["sees"] == nonce and facts[name]["writes"] is None]
            disk = {"do": "disk", "folder": str(folder), "marker": marker, "bytes": _DISK_BYTES}
            disks = found.ask({name: disk | {"node": name} for name in seeing}, _ANSWER_SECONDS)
            problems += disk_problems(disks)
            network: Json = {}
            if len(good) > 1:
                tell("network")
                network = _network(config, found, facts, good)
                problems += network.pop("problems")
    finally:
        for path in folder.glob(f"{marker}*"):
            path.unlink(missing_ok=True)
    nodes = {name: facts[name] | {"clock_offset": clocks.get(name), "disk": disks.get(name)} for name in facts}
    for fact in nodes.values():
        fact["sees"] = fact.get("sees") == nonce
    return Diagnosis(nodes, network, tuple(problems), time.monotonic() - started)


def _in_order(config: LaunchConfig, found: Probes) -> list[str]:
    """The nodes that answered, in the config's order, else by name."""
    known = [host_name(host) for host in config.cluster.hosts] if config.cluster.backend == "ssh" else []
    return sorted(found.nodes, key=lambda name: (known.index(name) if name in known else 0, len(name), name))


def _clock_offset(found: Probes, name: str) -> float | None:
    """Seconds that a node's clock is ahead of this one's: the try with the shortest way there and back."""
    tries = []
    for _ in range(_CLOCK_TRIES):
        sent = time.time()
        answer = found.ask({name: {"do": "clock"}}, _ANSWER_SECONDS)[name]
        received = time.time()
        if "time" in answer:
            tries.append((received - sent, answer["time"] - (sent + received) / 2))
    return min(tries)[1] if tries else None


def _network(config: LaunchConfig, found: Probes, facts: Mapping[str, Json], names: list[str]) -> Json:
    """Who reaches whom, then bandwidths among the nodes that reach all others."""
    addresses = {name: [found.address_of(name), facts[name]["port"]] for name in names}
    requests = {n: {"do": "reach", "peers": {p: a for p, a in addresses.items() if p != n}} for n in names}
    reach = found.ask(requests, _ANSWER_SECONDS + 3.0 * len(names))
    problems = list(reach_problems(reach))
    blocked = {peer for answer in reach.values() for peer in answer.get("failed", {})}
    chosen = [name for name in names if name not in blocked and not reach[name].get("failed", True)]
    chosen = [name for name in chosen if facts[name]["packages"].get("torch")]
    if len(chosen) < 2:
        return {"problems": problems}
    cuda = bool(config.cluster.gpus_per_node) and config.cluster.environment.get("DS_ACCELERATOR") != "cpu"
    probe = {
        "world_size": len(chosen),
        "address": addresses[chosen[0]][0],
        "port": facts[chosen[0]]["free_port"],
        "device": "cuda" if cuda else "cpu",
    }
    seconds = 60.0 + 5.0 * len(chosen)
    common = {
        "do": "network",
        "seconds": seconds,
        "environment": {"OMP_NUM_THREADS": "1", **config.cluster.environment},
    }
    answers = found.ask({n: {**common, "probe": probe | {"rank": r}} for r, n in enumerate(chosen)}, seconds + 5.0)
    failed = {name: answer["error"] for name, answer in answers.items() if "error" in answer}
    if failed:
        return {"problems": [*problems, *(f"{n}: the bandwidth test failed: {e}" for n, e in failed.items())]}
    answer = answers[chosen[0]]
    pairs = {(chosen[source], chosen[target]): speed for source, target, speed in answer["pairs"]}
    problems += network_problems(pairs)
    shown = [{"from": source, "to": target, "bytes_per_second": speed} for (source, target), speed in pairs.items()]
    return {
        "backend": "nccl" if cuda else "gloo",
        "all_reduce_bytes_per_second": answer["all_reduce"],
        "pairs": shown,
        "problems": problems,
    }


# -- where the probes run ----------------------------------------------------------------------------------------------


def _probes(config: LaunchConfig, only: Sequence[str], queue_seconds: int) -> contextlib.AbstractContextManager[Probes]:
    cluster = config.cluster
    if cluster.backend == "ssh":
        known = [host_name(host) for host in cluster.hosts]
        _refuse_unknown(only, known)
        hosts = tuple(host for host in cluster.hosts if not only or host_name(host) in only)
        cluster = cluster.model_copy(update={"hosts": hosts, "spare_nodes": 0})
        return ssh_probes(cluster, cluster.connect_seconds + _START_SECONDS)
    if cluster.backend == "slurm":
        return _slurm_probes(cluster, only, queue_seconds)
    _refuse_unknown(only, [node_name()])
    return _here_probes()


def _refuse_unknown(only: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in only if name not in known]:
        raise UserError(f"--on names {', '.join(unknown)}; the nodes of this config are {', '.join(known)}")


def _here_probes() -> contextlib.AbstractContextManager[Probes]:
    def start(port: int, token: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
        variables = {LINK_VARIABLE: f"127.0.0.1 {port} {token}"}
        return _popen([sys.executable, "-P", "-m", PROBE], variables, output)

    return probes({node_name(): start}, {node_name(): [node_name()]}, 1, _START_SECONDS)


def _slurm_probes(
    cluster: SlurmCluster, only: Sequence[str], queue_seconds: int
) -> contextlib.AbstractContextManager[Probes]:
    """One srun: in the allocation that this runs in, or one of its own, which has to come within `queue_seconds`."""
    if in_allocation():
        allocated = expand(os.environ["SLURM_JOB_NODELIST"])
        _refuse_unknown(only, allocated)
        nodes = [node for node in allocated if not only or node in only]
        command = step_command(cluster, nodes, Path.cwd(), PROBE)
        address, count, names = address_towards(nodes), len(nodes), nodes
    else:
        count, names, address = len(only) or cluster.nodes, list(only), "srun"
        command = _srun_command(cluster, only, count, queue_seconds)

    def start(port: int, token: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
        variables = cluster.environment | step_variables(cluster, f"{address} {port} {token}")
        return _popen(command, variables, output)

    return probes({"srun": start}, {"srun": names}, count, queue_seconds + _START_SECONDS)


def _srun_command(cluster: SlurmCluster, only: Sequence[str], count: int, queue_seconds: int) -> list[str]:
    options = sbatch_options(Job("doctor", Path.cwd(), [], None), cluster)
    known = {*_SRUN, *cluster.sbatch} - _NOT_SRUN
    kept = {name: value for name, value in options.items() if name in known}
    if only:
        kept["nodelist"] = ",".join(only)
    written = [f"--{name}" if value is None else f"--{name}={value}" for name, value in kept.items()]
    inside, task = node_task(cluster, Path.cwd(), PROBE)
    lines = [] if inside else cluster.setup  # Pyxis would run them inside, and they are for outside
    setup = "\n".join([*(f"{line}\n[ $? = 0 ] || exit 2" for line in lines), 'exec "$@"'])
    return [
        *("srun", "--job-name=doctor", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--time=10"),
        *(f"--immediate={queue_seconds}", "--mpi=none", "--cpu-bind=none", "--gpu-bind=none"),
        *("--input=none", "--export=ALL"),
        *("--no-kill", "--kill-on-bad-exit=0", "--wait=0", *written, *inside, "bash", "-c", setup, "doctor", *task),
    ]


def _popen(command: Sequence[str], variables: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command, env=step_environment(variables), stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
