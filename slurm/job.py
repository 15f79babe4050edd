"""Writes the job script of a run: one template, one pure function."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import is_secret_name
from trainer.config.schema import SlurmCluster
from trainer.failures import UserError

SCRIPT = "job.sbatch"  # in the run's directory, and the template of it beside this file
_FOLDER = Path(__file__).resolve().parent
# Needs no quotes in an #SBATCH line, nor anywhere else
_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]^-]+")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_ASSIGNMENT = re.compile(r"\b([A-Za-z_]\w*)=[\"']?([^\s\"']+)")

# What dsft's own way of running depends on; everything else may be given in `cluster.sbatch`
RESERVED: Mapping[str, str] = {
    "array": "cluster.array",
    "chdir": "output_dir",
    "clusters": "the login nodes of that cluster (dsft asks the SLURM of the one that it runs on)",
    "container": "cluster.container",
    "container-image": "cluster.container (the supervisor stays outside, where SLURM's commands are)",
    "container-mounts": "cluster.container.mounts",
    "container-name": "cluster.container.arguments",
    "container-workdir": "cluster.container",
    "error": "output_dir",
    "export": "cluster.environment and cluster.pass_environment",
    "export-file": "cluster.environment",
    "gpu-bind": "cluster.bind_cpus (a node's agent gets all its GPUs and gives each rank one)",
    "gpus-per-task": "cluster.gpus_per_node (there is one task a node)",
    "input": "nothing (jobs read no input)",
    "job-name": "name",
    "no-kill": "cluster.spare_nodes or cluster.min_nodes",
    "no-requeue": "cluster.requeue",
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes",
    "ntasks-per-gpu": "cluster.processes_per_node",
    "ntasks-per-node": "cluster.processes_per_node",
    "open-mode": "nothing (output is always appended)",
    "output": "output_dir",
    "requeue": "cluster.requeue",
    "signal": "cluster.grace_seconds",
    "wait": "dsft launch --watch",
    "wrap": "cluster.setup",
}


class _Template(string.Template):
    delimiter = "@@"
    flags = re.ASCII


@dataclass(frozen=True)
class Job:
    """What is to be submitted: `command` runs the supervisor on the first node; `package_path` goes on PYTHONPATH."""

    name: str
    run_dir: Path
    command: Sequence[str]
    package_path: str | None = None
    array: str | None = None  # several at a time, unlike the chain of `cluster.array`

    @property
    def log_path(self) -> Path:
        """Where the output of the batch script and of the supervisor is appended to; job N of an array adds `.N`."""
        return self.run_dir / "job.log"

    @property
    def script_path(self) -> Path:
        return self.run_dir / SCRIPT


def render(job: Job, cluster: SlurmCluster) -> str:
    """The job script. Values reach SLURM and the ranks unchanged; UserError for those that could not."""
    options = sbatch_options(job, cluster)
    variables = dict(cluster.environment)
    if not cluster.requeue:
        variables["DSFT_REQUEUE"] = "0"
    lines = [f"export {name}={quote(value, f'cluster.environment.{name}')}" for name, value in variables.items()]
    lines += [f': "${{{name}:?is named in cluster.pass_environment}}"' for name in cluster.pass_environment]
    if job.package_path is not None:
        root = quote(job.package_path, "the folder of dsft")
        lines.append(f'export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    lines.append("export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1")
    return _Template((_FOLDER / SCRIPT).read_text()).substitute(
        options="\n".join(f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in options.items()),
        run_dir=job.run_dir,
        environment="\n".join(lines),
        setup="\n".join(_setup_lines(cluster.setup)),
        command=" ".join(quote(part, "the command") for part in job.command),
    )


def sbatch_options(job: Job, cluster: SlurmCluster) -> dict[str, str | None]:
    """Name -> value as written in the script (None: a flag). Raises UserError for what sbatch would misread."""
    most = cluster.nodes + cluster.spare_nodes
    given: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "output": _file_name(str(job.log_path)) + (".%a" if job.array else ""),
        "open-mode": "append",
        "export": "ALL",
        "nodes": f"{cluster.fewest_nodes}-{most}" if most > cluster.fewest_nodes else cluster.nodes,
        # no number of tasks: with one, sbatch gives no spare nodes
        "no-kill": most > cluster.fewest_nodes,
        "requeue": cluster.requeue,
        "no-requeue": not cluster.requeue,
        "signal": f"B:USR1@{cluster.grace_seconds}",
        "array": job.array or cluster.array,
    }
    given |= {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": cluster.time,
        "mem": cluster.memory,
        "cpus-per-task": cluster.cpus_per_task,
        "gpus-per-node": None if gives_gpus(cluster.sbatch) else cluster.gpus_per_node or None,
        "exclusive": cluster.exclusive,
        "nodelist": cluster.nodelist,
        "exclude": cluster.exclude,
        "dependency": cluster.dependency,
        "reservation": cluster.reservation,
        "mail-user": cluster.mail_user,
        "mail-type": ",".join(cluster.mail_type) or None,
    }
    for name, value in cluster.sbatch.items():
        if not _OPTION.fullmatch(name):
            raise UserError(f"cluster.sbatch.{name}: give sbatch's long options without dashes, as in `switches`")
        if name in RESERVED:
            raise UserError(f"cluster.sbatch.{name}: dsft sets this option itself; use {RESERVED[name]}")
        if given.get(name) not in (None, False):
            raise UserError(f"cluster.sbatch.{name}: `cluster` gives this option already; keep one of them")
        given[name] = value
    return {
        name: None if value is True else option_value(str(value), name)
        for name, value in given.items()
        if value is not None and value is not False
    }


def gives_gpus(extras: Mapping[str, str | int | bool]) -> bool:
    """Whether raw options ask for the GPUs in their own way: by type, which SLURM takes only once, or not at all."""
    return "gpus" in extras or "gpus-per-node" in extras or "gpu" in str(extras.get("gres", ""))


def option_value(value: str, option: str) -> str:
    """A value as it has to be written in an #SBATCH line, which knows quotes but expands nothing."""
    if _PLAIN.fullmatch(value):
        return value
    where = f" (see {RESERVED[option]})" if option in RESERVED else ""
    if not value or not value.isprintable() or "\\" in value or ('"' in value and "'" in value):
        raise UserError(
            f"{value!r} cannot be given to sbatch as --{option}{where}: line breaks, control characters, backslashes "
            "and both kinds of quotes in one value would be misread. Choose another value."
        )
    return f"'{value}'" if '"' in value else f'"{value}"'


def quote(value: str, what: str) -> str:
    """A value as one word of bash, on one line."""
    if "\0" in value:
        raise UserError(f"{what} holds a NUL character, which no environment variable or argument can; remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid Unicode text: {error.reason}") from None
    if value.isprintable():
        return shlex.quote(value)
    # sbatch refuses a script with DOS line ends, and a line break could pass for a line of the script
    return "$'" + "".join(_escaped(character) for character in value) + "'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return "\\" + character
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" if byte < 0x80 else f"\\{byte:03o}" for byte in character.encode())


def _file_name(path: str) -> str:
    """sbatch expands %j and the like in file names."""
    return path.replace("%", "%%")


def _setup_lines(lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    # A line may be anything, also one that ends in a comment: its status is looked at on the next one
    written = [
        "",
        "# What these leave in the environment reaches the supervisor and, through srun, every agent and rank.",
        "# shellcheck disable=SC2181,SC2317",
        'setup_done() { [ "$1" = 0 ] || { echo "dsft: line $2 of cluster.setup failed (status $1)" >&2; exit 2; }; }',
    ]
    for number, line in enumerate(lines, start=1):
        if "\r" in line or "\0" in line:
            raise UserError(f"line {number} of cluster.setup holds a carriage return or NUL character; remove it")
        for name, value in _ASSIGNMENT.findall(line):
            if is_secret_name(name) and not value.startswith("$"):
                raise UserError(
                    f"line {number} of cluster.setup would write {name} into the job script; name it in "
                    "`cluster.pass_environment` and set it in the shell that runs `dsft launch`"
                )
        written += [line, f"setup_done $? {number}"]
    return [*written, ""]
