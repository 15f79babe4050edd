"""SLURM: submits the job of a run; inside a job, starts the agents of each attempt on its nodes with srun."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.backends.links import (
    END_SECONDS,
    START_SECONDS,
    Ends,
    LinkedAttempt,
    LinkedBackend,
    address_towards,
    answered,
    passed_environment,
)
from launcher.backends.node import INTERFACE_VARIABLE, LINK_VARIABLE
from slurm import client
from slurm.containers import contained
from slurm.hostlist import expand
from slurm.job import RESERVED, Job, render, sbatch_options
from trainer.config.schema import ResilienceConfig, SlurmCluster
from trainer.failures import DsftError, UserError
from trainer.processes import added_root, child_environment
from trainer.rundir import RunDirectory

# SLURM may deliver the signal a minute late, and needs a little to end and requeue the job
LATE_SECONDS = 75
_LOST_STEP_SECONDS = 1.0
# Variables of a job that srun takes for options ("INPUT ENVIRONMENT VARIABLES" of its manual page)
_OF_JOBS_TASKS = {
    "SRUN_CPUS_PER_TASK",
    *(f"SLURM_{word}" for word in ("CPU_BIND", "DISTRIBUTION", "EXACT", "EXCLUSIVE", "HINT", "NPROCS", "NTASKS")),
    *(f"SLURM_{word}" for word in ("GPUS", "GPUS_PER_NODE", "GPUS_PER_SOCKET", "GPU_BIND", "TRES_BIND")),
    *(f"SLURM_{word}_PER_TASK" for word in ("CPUS", "GPUS", "TRES")),
    *(f"SLURM_NTASKS_PER_{word}" for word in ("CORE", "GPU", "NODE", "SOCKET", "TRES")),
}
# sbatch tries a job out in these words, be it that no node could ever carry it or that some are away at present
_NO_NODES = "Requested node configuration is not available"
# Why jobs wait (JOB REASON CODES of squeue's manual page) that are larger or longer than they may be
_FOR_EVER = re.compile(r"Partition(Config|NodeLimit|TimeLimit)|BadConstraints|\w+PerJob(Limit)?")
_IMAGE_SECONDS = 1800.0  # for nodes to come that pull and unpack an image first
_PROBE_SECONDS = 15.0  # for a node that was lost to start a process


# -- before the job ----------------------------------------------------------------------------------------------------


def in_allocation() -> bool:
    """Whether this process runs inside a job, on its first node or in the shell that salloc opened."""
    return bool(os.environ.get("SLURM_JOB_ID") and os.environ.get("SLURM_JOB_NODELIST"))


def job_of(run: RunDirectory, name: str, cluster: SlurmCluster) -> Job:
    """The job of a run: `dsft launch` of its resolved config, inside the allocation."""
    root = added_root()
    python = cluster.python or sys.executable
    command = [python, "-P", "-m", "launcher", "launch", str(run.config_path)]
    return Job(name, run.path, command, None if root is None else str(root))


def script_of(job: Job, cluster: SlurmCluster) -> str:
    """The job script. Raises UserError for what sbatch, a container's runtime or bash would misread."""
    script = render(job, cluster)
    node_task(cluster, job.run_dir)  # refuses what cannot be put into a container
    check_syntax(script)
    return script


def submit(job: Job, cluster: SlurmCluster) -> str:
    """Write the job script into the run directory, have SLURM try it out, and submit it; returns the job id.

    Raises UserError for what cannot work, SlurmUnavailable if SLURM does not answer. What has to wait for nodes that
    are away at present is submitted, with a warning.
    """
    script = script_of(job, cluster)
    passed_environment(cluster)  # sbatch hands it on
    job.run_dir.mkdir(parents=True, exist_ok=True)
    job.script_path.write_text(script)
    environment = client.submission_environment([*RESERVED, *sbatch_options(job, cluster)])
    try:
        client.try_out(job.script_path, job.run_dir, environment)
        doubt = ""
    except client.SlurmError as error:
        if "Invalid job array" in str(error):
            raise UserError(f"{error}: longer than this cluster's MaxArraySize (`scontrol show config`)") from None
        if _NO_NODES not in str(error):
            raise
        doubt = str(error)
    job_id = client.submit(job.script_path, job.run_dir, environment)
    reason = _waiting_for(job_id)
    if _FOR_EVER.fullmatch(reason):
        client.cancel(job_id)
        raise UserError(
            f"SLURM takes this job but would never start it ({reason}): ask for less of nodes, time, CPUs, memory or "
            "GPUs in `cluster`, or for another partition; `scontrol show partition` shows limits. It is cancelled"
        )
    if doubt:
        print(
            f"warning: job {job_id} waits for nodes that are down, drained or reserved at present ({reason or doubt}); "
            "`sinfo -R` and `scontrol show reservation` tell more",
            file=sys.stderr,
        )
    return job_id


def _waiting_for(job_id: str) -> str:
    """SLURM's reason why a job waits; empty if it does not, or nobody knows."""
    with contextlib.suppress(DsftError):
        for job in client.queued([job_id]).values():
            return job.reason if job.state == "pending" and job.reason != "None" else ""
    return ""


def resilience_in_job(resilience: ResilienceConfig, cluster: SlurmCluster) -> ResilienceConfig:
    """A last checkpoint may take as long as SLURM leaves between the signal and the time limit."""
    grace = max(resilience.stop_grace_seconds, float(cluster.grace_seconds - LATE_SECONDS))
    return resilience.model_copy(update={"stop_grace_seconds": grace})


def check_syntax(script: str) -> None:
    """Raise UserError if bash cannot read the script: setup lines are the user's own."""
    bash = shutil.which("bash")
    if bash is not None:
        done = subprocess.run([bash, "-n"], input=script, text=True, capture_output=True)
        if done.returncode != 0:
            raise UserError(f"cluster.setup is not valid shell code: {' '.join(done.stderr.split())}")


# -- inside the job ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SlurmAttempt(LinkedAttempt):
    """A started attempt: one srun step, and a link to each of its nodes."""

    step: subprocess.Popen[bytes]
    _told: bool = False

    def poll(self) -> dict[str, int] | None:
        """Node -> exit code of its agent (NODE_LOST: it or its link is gone) once no agent is left, else None."""
        if self._is_terminating() and not self._told:
            # the job has to make room, or somebody cancels it: which of them can be asked later (`launcher.requeue`),
            # but everything is killed KillWait seconds from now
            with contextlib.suppress(OSError):  # storage away for a moment
                if self.run.stop_request(self.attempt) is None:
                    self.run.request_stop(self.attempt, "terminate")
                self._told = True
        return self.ends.poll(lambda _: self.step.poll())

    def _is_terminating(self) -> bool:
        return any(node.terminating for node in self.links.nodes.values())

    def kill(self) -> list[int]:
        """Close the links, upon which every node kills what it has; then end the step."""
        if self._closed:
            return []
        self._closed = True
        nodes = list(self.links.nodes.values())
        self.links.close()
        try:
            # srun waits for a node that is gone until SLURM has noticed: half a minute; and after TERM none is left
            hasty = self._is_terminating() or any(node.lost for node in nodes)
            self.step.wait(_LOST_STEP_SECONDS if hasty else END_SECONDS)
        except subprocess.TimeoutExpired:
            for name in {node.step for node in nodes if node.step}:  # SLURM may be as slow to answer
                threading.Thread(target=_cancel_step, args=(name,), daemon=True).start()
            self.step.kill()
            self.step.wait()
        return []


def _cancel_step(name: str) -> None:
    with contextlib.suppress(DsftError):
        client.cancel(name, signal="KILL")


@dataclass
class SlurmBackend(LinkedBackend):
    """Starts attempts inside the allocation that this process runs in."""

    cluster: SlurmCluster

    def start(self, attempt: int) -> SlurmAttempt:
        """Start a held agent on each of the attempt's nodes: spares rather than nodes lost before."""
        allocated = expand(os.environ["SLURM_JOB_NODELIST"])
        usable = self._usable(allocated) if self._last is not None else allocated
        nodes = self.pool.choose(usable) or self.pool.choose(allocated)
        if not nodes:
            raise UserError(
                f"the allocation has {len(allocated)} node(s), the run needs {min(self.pool.sizes)}: "
                f"allocate more, launch with --set cluster.nodes={len(allocated)}, or submit a job from here: "
                "`env -u SLURM_JOB_ID dsft launch ...`"
            )
        here = os.environ.get("SLURM_GPUS_ON_NODE", "")  # of the first node
        if here.isdigit() and int(here) < self.cluster.gpus_per_node:
            raise UserError(
                f"the allocation has {here} GPU(s) on a node, cluster.gpus_per_node is {self.cluster.gpus_per_node}: "
                f"ask for more, or launch with --set cluster.gpus_per_node={here}"
            )
        links = self._open_links(nodes, attempt, {})
        variables = step_variables(self.cluster, f"{address_towards(allocated)} {links.port} {links.token}")
        command = step_command(self.cluster, nodes, self.run.path)
        try:
            # srun reports on the job's own output; ranks and agents write to files of their own
            step = subprocess.Popen(command, env=step_environment(variables), stdin=subprocess.DEVNULL)
        except OSError as error:
            links.close()
            raise UserError(
                f"srun cannot be started: {error.strerror}; is this the first node of a SLURM job?"
            ) from None
        seconds = START_SECONDS if self.cluster.container is None else _IMAGE_SECONDS
        started = SlurmAttempt(run=self.run, attempt=attempt, links=links, ends=Ends(links, seconds), step=step)
        self._last = started
        return started

    def exhausted(self) -> str | None:
        """Why this allocation cannot carry another attempt; None while it can. Call it after a failed one."""
        allocated = expand(os.environ["SLURM_JOB_NODELIST"])
        self._lose()
        usable = [node for node in self._usable(allocated) if not self.pool.is_ruled_out(node)]
        if self.pool.size(len(usable)):
            return None
        lost = sorted(set(allocated) - set(usable))
        return (
            f"{', '.join(lost)} failed, and {len(usable)} node(s) of the allocation are left for "
            f"{min(self.pool.sizes)}: the job has to be requeued; with `cluster.spare_nodes` or `cluster.min_nodes` it "
            "goes on in the same allocation"
        )

    def candidates(self) -> list[str]:
        """The nodes of the allocation that are up, as far as SLURM knows: it learns late of those that are not."""
        return self._usable(expand(os.environ["SLURM_JOB_NODELIST"]))

    def answering(self, nodes: Sequence[str]) -> list[str]:
        """Those of the allocation's nodes on which a step can be started now."""
        shape = ["srun", "--job-name=dsft-probe", "--overlap", "--nodes=1", "--ntasks=1", "--mpi=none", "--input=none"]
        steps = {
            node: subprocess.Popen(
                [*shape, f"--nodelist={node}", "true"],
                env=step_environment({}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for node in nodes
        }
        return answered(steps, _PROBE_SECONDS)

    def seconds_left(self) -> float:
        """Until the ranks are told that the time limit is near; it may have been moved since the job began."""
        job = client.job(client.own_id())
        return math.inf if job is None else client.duration(job.time_left) - self.cluster.grace_seconds

    def _usable(self, allocated: list[str]) -> list[str]:
        """SLURM takes nodes that are down out of a running job, and marks those that do not answer."""
        with contextlib.suppress(DsftError, ValueError):
            if (job := client.job(client.own_id())) is not None and job.node_list:
                allocated = [node for node in expand(job.node_list) if node in allocated]
            states = client.node_states(",".join(allocated)) if allocated else {}
            return [node for node in allocated if not _is_down(states.get(node, ""))]
        return allocated


def _is_down(state: str) -> bool:
    """From sinfo's words; a star: it does not answer."""
    return state.endswith("*") or state.startswith(("down", "fail", "drain"))


def step_command(
    cluster: SlurmCluster, nodes: Sequence[str], run_dir: Path, module: str = "launcher.backends.node"
) -> list[str]:
    """The srun that has `module` run once on each of `nodes`."""
    count = str(len(nodes))
    options, task = node_task(cluster, run_dir, module)
    return [
        *("srun", "--job-name=dsft", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1"),
        f"--nodelist={','.join(nodes)}",
        # the agent sees all that the job has of the node; since SLURM 22.05 srun takes no count from sbatch
        *([f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []),
        # so does not what was said of GPUs for a job's tasks or for all nodes together
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if _has_gpus(cluster) else []),
        *("--cpu-bind=none", "--gpu-bind=none", "--mpi=none", "--export=ALL", "--input=none"),
        # the step of an attempt that lost a node is not over for SLURM until it has noticed
        "--overlap",
        # the supervisor decides when the rest has to end
        *("--no-kill", "--kill-on-bad-exit=0", "--wait=0"),
        *options,
        *task,
    ]


def node_task(
    cluster: SlurmCluster, folder: Path, module: str = "launcher.backends.node"
) -> tuple[list[str], list[str]]:
    """(options of srun, command) of a task that runs `module` on a node, in the container if there is one."""
    container = cluster.container
    if container is None:
        return [], [cluster.python or sys.executable, "-P", "-m", module]
    root = added_root()
    task = [container.python, "-P", "-m", module]
    return contained(container, task, folder, [] if root is None else [root], cluster.gpus_per_node > 0)


def _has_gpus(cluster: SlurmCluster) -> bool:
    """Whether SLURM gives GPUs out; where `sbatch.gpus-per-node` is false, nodes have some that it knows nothing of."""
    return cluster.gpus_per_node > 0 and cluster.sbatch.get("gpus-per-node") is not False


def step_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment for a srun, without what a batch line said of the tasks of the job: dsft starts one a node."""
    return {name: value for name, value in child_environment(variables).items() if name not in _OF_JOBS_TASKS}


def step_variables(cluster: SlurmCluster, link: str) -> dict[str, str]:
    """Variables of a step's tasks, beside those of this process."""
    variables = {LINK_VARIABLE: link}
    if cluster.network_interface:
        variables[INTERFACE_VARIABLE] = cluster.network_interface
    if cluster.container is not None:
        variables["PYTHONNOUSERSITE"] = "1"  # the home folder may be mounted: its packages are for another Python
    return variables
