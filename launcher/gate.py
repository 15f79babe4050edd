"""The checks that need a tokenizer or the data: `trainer.check` in a process of its own, beside the agents' start."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainer.failures import EXIT_DONE, EXIT_USER, DataError, DsftError, UserError
from trainer.processes import child_environment

_SHOWN_BYTES = 4000


@dataclass
class CheckProcess:
    """A running preflight; `result` is what it printed, once `poll` has returned True."""

    config_path: Path
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Files, not pipes: nobody reads while it runs
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer.check", str(self.config_path)],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,
        )

    def poll(self) -> bool:
        """True once passed. Raises UserError or DataError with every problem found, DsftError if the check broke."""
        code = self._process.poll()
        if code is None:
            return False
        lines = _text(self._output).strip().splitlines()
        with contextlib.suppress(ValueError, IndexError):
            self.result = json.loads(lines[-1])
        if code == EXIT_DONE and self.result.get("ok"):
            return True
        if code == EXIT_USER and self.result.get("errors"):
            kind = UserError if self.result.get("class") == "user" else DataError
            raise kind("\n".join(str(error) for error in self.result["errors"]))
        raise DsftError(f"the preflight check ended with code {code}: {_text(self._errors)[-_SHOWN_BYTES:].strip()}")

    def cancel(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._errors.close()


def checked(config_path: Path) -> list[str]:
    """Check the data and tokenizer of a config; its warnings. Raises UserError, DataError."""
    gate = CheckProcess(config_path)
    try:
        while not gate.poll():
            time.sleep(0.05)
    finally:
        gate.cancel()
    return list(gate.result.get("warnings", ()))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
