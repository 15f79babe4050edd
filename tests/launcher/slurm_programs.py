"""Programs in the place of SLURM's, for tests of what its answers lead to."""

from __future__ import annotations

from pathlib import Path

import pytest


def program_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of the system's programs; the user's own state is out of reach."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return folder


def program(folder: Path, name: str, text: str) -> None:
    """A shell script in it, which notes each call in `calls`."""
    (folder / name).write_text(f"#!/bin/sh\necho {name} >> {folder}/calls\n{text}\n")
    (folder / name).chmod(0o755)
