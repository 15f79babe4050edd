"""How the task of a srun is put into a container: one pure function, and what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config.clusters import SlurmContainer
from trainer.failures import UserError

# Arguments of the runtimes that would take from an agent what it needs, or that dsft gives itself
_REFUSED = {
    "apptainer": {
        "--cleanenv": "agents need their environment",
        "-e": "agents need their environment",
        "--containall": "agents need their environment",
        "-C": "agents need their environment",
        "--compat": "agents need their environment",
        "--net": "agents need the node's network",
        "-n": "agents need the node's network",
        "--cwd": "dsft gives it",
        "--pwd": "dsft gives it",
    },
    "charliecloud": {"--cd": "dsft gives it", "-c": "dsft gives it"},
    "pyxis": {
        "--container-image": "use cluster.container.image",
        "--container-mounts": "use cluster.container.mounts",
        "--container-workdir": "dsft gives it",
        "--container-save": "every node would write it",
    },
}
_REFUSED["singularity"] = _REFUSED["apptainer"]


def contained(
    container: SlurmContainer, task: Sequence[str], folder: Path, needed: Sequence[Path], gpus: bool
) -> tuple[list[str], list[str]]:
    """(further options of srun, its command) that run `task` inside, in `folder`, with the `needed` folders there too.

    Apptainer (`apptainer exec --help`), SingularityCE, which takes the same arguments, Charliecloud (ch-run(1)), and
    NVIDIA's Pyxis, a plugin that gives srun options of its own. Raises UserError for what they would misread.
    """
    runtime = container.runtime
    for argument in container.arguments:
        if reason := _REFUSED[runtime].get(argument.split("=")[0]):
            raise UserError(f"cluster.container.arguments: {argument} cannot be given ({reason}); remove it")
    mounts = list(container.mounts)
    for path in (folder, *needed):
        if mark := next((mark for mark in ":," if mark in str(path)), None):
            raise UserError(f"{path} cannot be mounted into a container, for the {mark!r} in it: choose another folder")
        mounts.append(str(path))
    if runtime == "pyxis":
        options = [f"--container-image={container.image}", f"--container-workdir={folder}", "--no-container-mount-home"]
        # a source without a target is not understood by all versions
        options.append("--container-mounts=" + ",".join(m if ":" in m else f"{m}:{m}" for m in mounts))
        return [*options, *container.arguments], list(task)
    binds = [f"--bind={mount}" for mount in mounts]
    if runtime == "charliecloud":
        return [], ["ch-run", f"--cd={folder}", *binds, *container.arguments, container.image, "--", *task]
    nvidia = ["--nv"] if gpus and not {"--nv", "--nvccli", "--rocm"} & set(container.arguments) else []
    return [], [runtime, "exec", f"--pwd={folder}", *nvidia, *binds, *container.arguments, container.image, *task]
