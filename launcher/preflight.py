"""What can be checked before a launch without torch: files, permissions, disk. Data and tokens: `trainer.check`."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher import notify
from launcher.console import gib
from launcher.facts import Facts, existing_parent
from launcher.plan import Plan
from trainer import local_disk
from trainer.config.loading import is_image_file
from trainer.config.schema import LaunchConfig
from trainer.failures import UserError
from trainer.health import WITHOUT_CUDA
from trainer.planning.throughput import lacks_fp8
from trainer.planning.weight_files import damage
from trainer.rundir import RunDirectory


def preflight(config: LaunchConfig, plan: Plan, facts: Facts) -> None:
    """Refuse what cannot work. Raises UserError naming every problem there is."""
    problems = preflight_problems(config, plan, facts)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(
            "\n".join([f"{len(problems)} things to change before this can run", *(f"  {p}" for p in problems)])
        )


def preflight_problems(config: LaunchConfig, plan: Plan, facts: Facts) -> list[str]:
    """Every problem, in the config's order; empty where the run can start."""
    return [
        *_output(config, plan, facts),
        *_disk(config, plan),
        *_torch(plan, facts),
        *_fp8(config, plan),
        *_weights(config),
        *_positions(config, plan),
        *input_problems(config),
        *_image(config),
        *_job(config, plan),
        *notify.problems(config.resilience.notify),
    ]


# Families with an embedding for each position, and how many of them their padding takes
_LEARNED_POSITIONS = {"albert": 0, "bert": 0, "distilbert": 0, "electra": 0, "gpt2": 0, "opt": 0}
_LEARNED_POSITIONS |= {"camembert": 2, "roberta": 2, "xlm-roberta": 2}


def input_problems(config: LaunchConfig) -> list[str]:
    """Files that the config names and that are not there."""
    return [*_tokenizer(config), *_data(config)]


def _output(config: LaunchConfig, plan: Plan, facts: Facts) -> Iterator[str]:
    parent = existing_parent(Path(plan.run_dir))
    if not parent.is_dir():
        yield f"output_dir: {parent} is a file, not a folder; choose another output_dir"
        return
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        yield f"output_dir: no file can be written in {parent} ({error.strerror}); choose another output_dir"
        return
    if plan.checkpoint_bytes is None or plan.model.parameters is None:
        return
    # one more than is kept: the oldest goes only when the newest is whole
    number = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    checkpoints = plan.checkpoint_bytes * number
    dtype = config.model.dtype if config.export.dtype == "auto" else config.export.dtype
    export = plan.model.parameters * (2 if dtype == "bfloat16" else 4) if config.export.enabled else 0
    needed = checkpoints + export - _written(Path(plan.run_dir))
    if needed > facts.disk_free:
        yield (
            f"output_dir: the run needs {gib(needed)} more disk in {parent} ({number} checkpoints of "
            f"{gib(plan.checkpoint_bytes)}, {gib(export)} for the export), and {gib(facts.disk_free)} are free; "
            "free some, choose another output_dir, or lower checkpoint.keep_last"
        )


def _written(run_dir: Path) -> int:
    """Bytes in the folders of a run, which may be running: files come and go."""
    size = 0
    for folder, _, names in os.walk(run_dir):
        for name in names if folder != str(run_dir) else ():
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_size
    return size


def _disk(config: LaunchConfig, plan: Plan) -> Iterator[str]:
    """Of this machine; every rank looks at its own node's."""
    if plan.nvme and config.cluster.backend == "local":
        needed = plan.memory.nvme if plan.memory else 0
        problem = local_disk.problem(Path(plan.nvme["path"]), plan.processes_per_node, needed)
        if problem:
            yield f"deepspeed.nvme_path: {problem}"


def _torch(plan: Plan, facts: Facts) -> Iterator[str]:
    """Of this machine; every rank looks at its own node's."""
    if plan.backend == "local" and plan.device == "cuda" and facts.torch and facts.torch.gpus is None:
        yield f"torch {facts.torch.version} {WITHOUT_CUDA}"


def _fp8(config: LaunchConfig, plan: Plan) -> Iterator[str]:
    """Ranks look again, at the GPU and the model themselves."""
    if config.model.fp8 == "none":
        return
    if plan.model.for_fp8 == 0:
        yield (
            "model.fp8: no matrix of the model's layers is trained, has sides divisible by 16, and is a "
            "torch.nn.Linear (GPT-2's are not); set it to none"
        )
    if plan.device != "cuda":
        return
    if plan.device_name and lacks_fp8(plan.device_name):
        yield f"model.fp8: {plan.device_name} has no products in 8 bits (Ada, Hopper and later have); set it to none"
    if config.model.dtype != "bfloat16":
        yield "model.fp8: on GPUs it needs model.dtype bfloat16"


def _weights(config: LaunchConfig) -> Iterator[str]:
    """Whether files of weights are missing in a model's folder or cut short, as when it was copied in part."""
    folder = Path(config.model.path or "")
    if not (folder.is_absolute() and folder.is_dir()):
        return
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        yield f"model.path: {folder} has no weights (*.safetensors, *.bin) beside its config.json; copy them there"
    elif found := damage(folder):
        yield f"model.path: {found}; copy it there again"


def _positions(config: LaunchConfig, plan: Plan) -> Iterator[str]:
    """A sample as long as it may be would fail in the middle of a run; other families only do worse: a plan warns."""
    family, positions = plan.model.model_type, plan.model.max_positions
    if family in _LEARNED_POSITIONS and positions is not None:
        limit = positions - _LEARNED_POSITIONS[family]
        if limit == positions:  # else what fills up a row takes no position
            limit -= limit % (64 if family in ("gpt2", "opt") and limit > 64 else 8)  # rows are filled up to so many
        if config.data.sequence_length > limit:
            yield f"data.sequence_length: {family} has positions for rows of {limit} tokens; lower it to that"


def _tokenizer(config: LaunchConfig) -> Iterator[str]:
    path = config.model.tokenizer
    if path is not None and os.path.isabs(path) and not os.path.exists(path):
        yield f"model.tokenizer: {path} does not exist; expected a folder, a tokenizer.json or a SentencePiece .model"
    path = config.model.processor
    if path is not None and os.path.isabs(path) and not os.path.exists(path):
        yield f"model.processor: {path} does not exist; expected a folder with a preprocessor_config.json"


def _data(config: LaunchConfig) -> Iterator[str]:
    for split in ("train", "evaluation"):
        for index, source in enumerate(getattr(config.data, split)):
            for key in ("source_path", "target_path") if source.format == "parallel" else ("path",):
                path = getattr(source, key, None)
                if path is not None and "://" not in path:
                    yield from (f"data.{split}.{index}.{key}: {problem}" for problem in _source(path))


def _image(config: LaunchConfig) -> Iterator[str]:
    container = getattr(config.cluster, "container", None)
    if container is not None and is_image_file(container.image) and not os.path.exists(container.image):
        yield f"cluster.container.image: there is no file or folder {container.image}"


def _job(config: LaunchConfig, plan: Plan) -> Iterator[str]:
    """What cannot stand in a job script; nothing in a job, which may be of a script of the user's own."""
    if config.cluster.backend != "slurm":
        return
    from launcher.backends.slurm import in_allocation, job_of, script_of

    if not in_allocation():
        try:
            script_of(job_of(RunDirectory(Path(plan.run_dir)), config.name, config.cluster), config.cluster)
        except UserError as error:
            yield str(error)


def _source(path: str) -> Iterator[str]:
    files = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        pattern = any(mark in path for mark in "*?[")
        more = "" if Path(path).suffix else "; a dataset of the Hugging Face hub is written hf://org/name"
        yield f"no file matches {path}" if pattern else f"there is no file or folder {path}{more}"
    for file in files:
        if not os.access(file, os.R_OK):
            yield f"{file} cannot be read (permissions)"
    if files and not any(os.path.isdir(file) or os.path.getsize(file) for file in files):
        yield f"{path} is empty"
