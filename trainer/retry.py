"""Trying again what fails now and then: network file systems, downloads."""

from __future__ import annotations

import errno
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

_ATTEMPTS = 6
FIRST_DELAY = 0.5  # seconds; doubled each time: 15 s in all

_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
_ASK_LATER = {408, 425, 429}  # HTTP statuses of clients' errors that pass

Result = TypeVar("Result")


def retried(action: Callable[[], Result], what: str) -> Result:
    """The result of an action that may fail for a while; its last error after 15 s of trying."""
    for attempt in range(_ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if attempt == _ATTEMPTS - 1 or not passing(error):
                raise
            delay = FIRST_DELAY * 2**attempt * random.uniform(0.8, 1.2)  # ranks do not come back all at once
            print(
                f"{what}: {error or type(error).__name__}; trying again in {delay:.1f} s", file=sys.stderr, flush=True
            )
            time.sleep(delay)
    raise AssertionError("unreachable")


def passing(error: Exception) -> bool:
    """Whether the same may work a moment later."""
    from trainer.failures import DsftError  # which imports what writes with retries

    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return passing(error.__cause__)  # fsspec calls a file missing whenever it cannot be had
    if isinstance(error, DsftError | ImportError | ValueError | TypeError | NotImplementedError | EOFError):
        return False
    if type(error).__name__ == "OfflineModeIsEnabled":  # huggingface_hub's, a ConnectionError
        return False
    if type(error) is OSError and error.errno is None:  # pyarrow's, of a damaged file
        return False
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _ASK_LATER
    return not (isinstance(error, OSError) and error.errno in _LASTING) and not isinstance(
        error, FileNotFoundError | PermissionError
    )
