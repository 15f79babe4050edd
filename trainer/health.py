"""Is this node fit to run ranks: asked by its agent before every attempt, within HEALTH_SECONDS. Torch-free."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.failures import EXIT_TEMPORARY, DsftError, FailureClass

# gloo, NCCL and the heartbeats of data workers live there; a full one ends ranks by SIGBUS
_SHARED_MEMORY, _SHARED_MEMORY_BYTES = "/dev/shm", 64 << 20
_GPU_SECONDS = 20.0
_QUERY = "index,ecc.errors.uncorrected.volatile.total"
_ROWS_QUERY = "gpu_bus_id,remapped_rows.failure"


WITHOUT_CUDA = (
    "is a build without CUDA, and this run is to use GPUs: install one that the driver supports (the first lines of "
    "`nvidia-smi` tell), or set cluster.gpus_per_node=0"
)


class UnfitNodeError(DsftError):
    """This node cannot run ranks; another one may."""

    failure_class: FailureClass = "node"
    exit_code = EXIT_TEMPORARY
    unfit = True


def check_node(config: Mapping[str, Any], device: str, ranks: int) -> None:
    """Raise UnfitNodeError if ranks of the run would fail here, or if the site's own check says so.

    Args:
        config: the run's config.json.
        device: `cpu` or `cuda`.
        ranks: of this node, each with a GPU of its own on `cuda`.
    """
    problems = [*_shared_memory(), *(_gpus(ranks) if device == "cuda" else ())]
    cluster = config.get("cluster") or {}
    if command := cluster.get("health_check"):
        problems += _site_check(command, float(cluster.get("health_check_seconds") or 60.0))
    if problems:
        raise UnfitNodeError("; ".join(problems))


def _shared_memory() -> Iterator[str]:
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return
    if free < _SHARED_MEMORY_BYTES:
        needed = _SHARED_MEMORY_BYTES >> 20
        yield f"{_SHARED_MEMORY} has {free >> 20} MiB free, ranks need {needed}: remove old files there"


def _gpus(ranks: int) -> Iterator[str]:
    if shutil.which("nvidia-smi") is None:  # a container may have none
        return
    if "MIG" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):  # parts of a GPU: its lines are fewer than ranks
        ranks = 1
    try:
        counts, rows = (_ask(option) for option in (f"--query-gpu={_QUERY}", f"--query-remapped-rows={_ROWS_QUERY}"))
    except subprocess.TimeoutExpired:
        yield f"nvidia-smi does not answer within {_GPU_SECONDS:.0f} s"
        return
    except OSError as error:
        yield f"nvidia-smi cannot be run: {error}"
        return
    yield from gpu_problems(counts, rows, ranks)


def gpu_problems(counts: str, rows: str, ranks: int) -> Iterator[str]:
    """What is wrong, from nvidia-smi's `index, errors` and `bus, failure` lines (`[N/A]`: the GPU does not count)."""
    gpus = [line.split(", ") for line in counts.splitlines() if line.split(", ")[0].isdecimal()]
    if len(gpus) < ranks:
        yield f"nvidia-smi sees {len(gpus)} working GPU(s), {ranks} ranks need one each"
    for index, errors in (gpu for gpu in gpus if len(gpu) == 2):
        if errors.isdecimal() and int(errors) > 0:
            yield f"GPU {index} has had {errors} uncorrectable memory error(s) since it was reset"
    for bus, failure in (line.split(", ") for line in rows.splitlines() if line.count(", ") == 1):
        if failure.strip() in ("1", "Yes"):
            yield f"GPU {bus} could not remap a row of its memory: it has to be replaced"


def _ask(option: str) -> str:
    done = subprocess.run(
        ["nvidia-smi", option, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=_GPU_SECONDS
    )
    return done.stdout if done.returncode == 0 else ""


def _site_check(command: Sequence[str], seconds: float) -> Iterator[str]:
    """The site's own program, without a shell; its output goes to the agent's log."""
    # to a file: what the program leaves running in the background would hold a pipe open
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            yield f"cluster.health_check cannot be run: {command[0]}: {error.strerror}"
            return
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            yield f"cluster.health_check did not end within {seconds:.0f} s"
        output.seek(0)
        text = output.read()
    print(text, end="", flush=True)
    if code:
        last = text.strip().splitlines()[-1:] or ["no output"]
        yield f"cluster.health_check ended with exit code {code}: {last[0][:300]}"
