"""The sections that say where a run runs: this machine, a SLURM allocation, hosts over SSH."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trainer.config.errors import is_secret_name
from trainer.config.hostfile import with_hostfile
from trainer.config.section import Flag, NonNegativeInt, PositiveFloat, PositiveInt, Section

# user@name; never an option, and safe as the name of a folder
_HOST = r"^([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.:%-]*$"


def _check_names(variables: Iterable[str]) -> None:
    for name in variables:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} cannot be the name of an environment variable; use letters, digits and _")


def _check_min_nodes(least: int | None, nodes: int) -> None:
    if least is not None and least > nodes:
        raise ValueError(f"min_nodes is {least}, but the run is planned for {nodes} nodes: give at most {nodes}")


class ClusterSection(Section):
    """What every backend knows."""

    environment: dict[str, str] = Field(default_factory=dict, description="Variables set for every rank")
    bind_cpus: Literal["auto", "off"] = Field(
        "auto", description="auto: each rank keeps to its share of the node's CPUs, near its GPU where that is known"
    )
    umask: str | None = Field(
        None,
        pattern=r"^0?0[0-7]{2}$",
        description='Of all processes: "0027", "0002"; default: the launching shell\'s',
    )
    health_check: tuple[str, ...] = Field(
        (),
        description='Program run on each node before every attempt, without a shell: ["/usr/sbin/nhc"]; not 0: unfit',
    )
    health_check_seconds: PositiveFloat = Field(60.0, description="After which a node that has not answered is unfit")
    group: str | None = Field(None, description="The group that run directories belong to, with all that is in them")


class _Nodes(ClusterSection):
    """What backends of several nodes know."""

    min_nodes: PositiveInt | None = Field(
        None,
        description="Without a spare for a lost node, go on with as few as this, same global batch; default: all it "
        "was planned for",
    )
    gpu_model: str | None = Field(
        None, description='Of the nodes, as nvidia-smi names it ("H100"): the plan then knows their memory and speed'
    )
    network_gigabits: PositiveFloat | None = Field(
        None,
        description="Gbit/s of a node to the others, one direction, all adapters together: for the plan's step time",
    )
    pass_environment: tuple[str, ...] = Field(
        (), description="Names of variables taken from the launching shell, such as tokens; never written down"
    )


class LocalCluster(ClusterSection):
    """This machine."""

    backend: Literal["local"] = "local"
    nodes: Literal[1] = 1
    processes_per_node: PositiveInt | None = Field(None, description="Default: `gpus_per_node`, else 1")
    gpus_per_node: NonNegativeInt | None = Field(
        None, description="Default: the GPUs found here, of those in CUDA_VISIBLE_DEVICES; one MIG instance at most"
    )


class SlurmContainer(Section):
    """The container that agents run in; the supervisor stays outside, where SLURM's commands are."""

    runtime: Literal["apptainer", "singularity", "charliecloud", "pyxis"] = Field(
        description="`apptainer exec`, `singularity exec` or `ch-run` in a srun; pyxis: its --container-image (Enroot)"
    )
    image: str = Field(
        min_length=1, description="A .sif, .sqsh or folder on shared storage (then absolute), or what the runtime pulls"
    )
    mounts: tuple[str, ...] = Field((), description="source[:target[:options]]; the run directory is always mounted")
    arguments: tuple[str, ...] = Field((), description="Further arguments of the runtime, taken as they are")
    python: str = Field("python3", description="Python inside; `cluster.python` is the one outside")

    @model_validator(mode="after")
    def _mountable(self) -> SlurmContainer:
        for mount in self.mounts:
            parts = mount.split(":")
            if not all(part.startswith("/") for part in parts[:2]) or "," in mount:
                raise ValueError(f"{mount!r} cannot be mounted: expected /source or /source:/target, without commas")
            if len(parts) > (2 if self.runtime == "charliecloud" else 3):
                raise ValueError(f"{mount!r} has more parts than {self.runtime} understands; ch-run takes no options")
        return self


class SlurmCluster(_Nodes):
    """A SLURM allocation. Options are called as in sbatch; further ones go into `sbatch`."""

    backend: Literal["slurm"]
    nodes: PositiveInt = Field(1, description="That a run trains on; see `spare_nodes` and `min_nodes`")
    spare_nodes: NonNegativeInt = Field(0, description="Asked for in addition, taken when a node fails")
    gpus_per_node: NonNegativeInt = Field(0, description="0: train on CPUs")
    processes_per_node: PositiveInt | None = Field(None, description="Default: `gpus_per_node`, else 1")
    cpus_per_task: PositiveInt | None = Field(None, description="CPUs of a node; there is one SLURM task a node")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = Field(
        None,
        pattern=r"^(\d+|\d+:\d+|(\d+-)?\d+:\d+:\d+|\d+-\d+(:\d+)?)$",
        description='Time limit as sbatch takes it: "24:00:00", "2-00:00:00" or minutes',
    )
    memory: str | None = Field(
        None, pattern=r"^\d+[KMGT]?$", description='Memory of a node as sbatch takes it: "64G"; "0": all of it'
    )
    exclusive: Flag = False
    nodelist: str | None = None
    exclude: str | None = None
    dependency: str | None = None
    reservation: str | None = None
    mail_user: str | None = None
    mail_type: tuple[Literal["BEGIN", "END", "FAIL", "REQUEUE", "TIME_LIMIT", "TIME_LIMIT_80", "ALL"], ...] = ()
    array: str | None = Field(
        None,
        pattern=r"^\d+-\d+%1$",
        description='A chain of jobs, "1-10%1": each goes on with the run where the last one stopped',
    )
    requeue: Flag = Field(True, description="Requeue the job until the run is done; off: chain jobs with `array`")
    grace_seconds: Annotated[int, Field(ge=60, strict=True)] = Field(
        300, description="Before the time limit: the stop request, which SLURM may deliver a minute late"
    )
    network_interface: str | None = Field(None, description="Default: where the route to the first node leads")
    python: str | None = Field(None, description="Python of the jobs; default: the one that runs dsft")
    setup: tuple[str, ...] = Field(
        (), description='Shell lines run first, "module load cuda"; the environment they leave reaches every node'
    )
    doctor: Flag = Field(
        False, description="Examine the nodes before the first attempt; those that have problems are used last"
    )
    container: SlurmContainer | None = None
    sbatch: dict[str, str | int | Flag] = Field(
        default_factory=dict, description='Further sbatch options: {"switches": 1, "contiguous": true}'
    )

    @property
    def fewest_nodes(self) -> int:
        """How many nodes an attempt may do with."""
        return self.min_nodes or self.nodes

    @model_validator(mode="after")
    def _sizes(self) -> SlurmCluster:
        _check_min_nodes(self.min_nodes, self.nodes)
        return self

    @model_validator(mode="after")
    def _names_of_variables(self) -> SlurmCluster:
        _check_names((*self.environment, *self.pass_environment))
        if secret := next((name for name in self.environment if is_secret_name(name)), None):
            raise ValueError(
                f"`environment` would write {secret} into the job script; name it in `pass_environment` instead, "
                "and set it in the shell that runs `dsft launch`"
            )
        return self


class SshCluster(_Nodes):
    """Hosts reached by plain ssh, without passwords. See docs/ssh.md."""

    backend: Literal["ssh"]
    hosts: tuple[Annotated[str, Field(pattern=_HOST)], ...] = Field(
        min_length=1, description="Names or addresses as ssh takes them; the first is rank 0's"
    )
    hostfile: str | None = Field(
        None, description="Instead of `hosts`: a file with a line `name slots=8` for each, as DeepSpeed and Open MPI"
    )
    spare_nodes: NonNegativeInt = Field(0, description="So many of the hosts are taken only when others are lost")
    processes_per_node: PositiveInt | None = Field(None, description="Default: slots, else `gpus_per_node`, else 1")
    gpus_per_node: NonNegativeInt | None = Field(None, description="0: train on CPUs")
    address: str | None = Field(
        None, description="Of the launching machine, as hosts reach it; default: what ssh connects from"
    )
    network_interface: str | None = Field(None, description="Default: where the route to the launching machine leads")
    python: str | None = Field(None, description="Python of the hosts; default: the one that runs dsft, same path")
    ssh_options: tuple[str, ...] = Field((), description='Arguments of ssh: ["-p", "2222", "-o", "User=train"]')
    connect_seconds: PositiveInt = Field(10, description="For ssh to connect")
    setup: tuple[str, ...] = Field((), description='Lines of bash run first on each host, "module load cuda"')

    @property
    def nodes(self) -> int:
        """How many hosts an attempt runs on."""
        return len(self.hosts) - self.spare_nodes

    @property
    def fewest_nodes(self) -> int:
        """How many hosts an attempt may do with."""
        return self.min_nodes or self.nodes

    @model_validator(mode="before")
    @classmethod
    def _read_hostfile(cls, value: Any) -> Any:
        return with_hostfile(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _usable(self) -> SshCluster:
        names = [host.rpartition("@")[2] for host in self.hosts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is among the hosts twice; one agent runs all ranks of a host")
        if self.spare_nodes >= len(self.hosts):
            raise ValueError(f"spare_nodes is {self.spare_nodes} of {len(self.hosts)} hosts: none is left to train on")
        _check_min_nodes(self.min_nodes, self.nodes)
        _check_names((*self.environment, *self.pass_environment))
        return self


Cluster = Annotated[LocalCluster | SlurmCluster | SshCluster, Field(discriminator="backend")]
