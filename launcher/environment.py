"""environment.json: what a run ran with. Names and versions only; no environment variables, so no secrets."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.failures import node_name

_PACKAGES = ("dsft", "torch", "deepspeed", "transformers", "tokenizers", "safetensors", "sentencepiece", "numpy")
_GIT_SECONDS = 5.0


def describe_environment(root: Path, gpus: Any) -> dict[str, Any]:
    """Versions, git commit of the code in `root` (if it is a checkout), machine and GPUs (as the facts name them)."""
    return {
        "time": time.time(),
        "node": node_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "git_commit": _git_commit(root),
        "gpus": gpus,
    }


def installed_version(package: str) -> str | None:
    """The version of an installed package, without importing it; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS).stdout.strip()
    return None
