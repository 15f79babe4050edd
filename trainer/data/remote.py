"""Copies on local disk of what is remote or compressed: made once a node, whole or not at all, in bounded memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from trainer.data.cache import cached, file_identity
from trainer.failures import DataError, StorageError
from trainer.retry import passing, retried

_BLOCK = 1 << 22  # bytes

COMPRESSED = (".gz", ".tgz", ".zst")


def expanded(path: Path, name: str) -> Path:
    """The decompressed copy of a .gz or .zst file: neither can be entered in the middle.

    Raises:
        DataError: it is damaged or cut short.
    """

    def write(file: IO[bytes]) -> None:
        try:
            with _decompressed(path) as source:
                while block := source.read(_BLOCK):
                    file.write(block)
        except EOFError:
            raise DataError(f"{name} is cut short: its end is missing; copy or download it again") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{name} is damaged: {error}; copy or download it again") from error
        except OSError as error:  # pyarrow has no error types for these
            if "Truncated compressed stream" in str(error):
                raise DataError(f"{name} is cut short: its end is missing; copy or download it again") from None
            if error.errno is None:
                raise DataError(f"{name} is damaged: {error}; copy or download it again") from error
            raise

    return cached("expanded", f"1 {file_identity(path)}", _inner(path), write)


def _decompressed(path: Path) -> Any:
    if path.suffix != ".zst":
        return gzip.open(path, "rb")
    import pyarrow  # has zstd, which Python has from 3.14 on

    return pyarrow.input_stream(str(path), compression="zstd")


def _inner(path: Path) -> str:
    return ".tar" if path.suffix == ".tgz" else Path(path.stem).suffix


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def is_hidden(path: str | Path) -> bool:
    """Whether a file in a folder of data is none of it (.ipynb_checkpoints/a.jsonl, ._a.jsonl, _delta_log/0.json)."""
    return any(part.startswith((".", "_")) for part in Path(path).parts)


def is_hub_dataset(path: str) -> bool:
    """Whether a path names a dataset of the Hugging Face hub as a whole: `hf://org/name`."""
    return path.startswith("hf://") and not path.startswith(("hf://datasets/", "hf://buckets/"))


def fetched(url: str, choose: Callable[[list[str]], list[str]]) -> list[tuple[Path, str]]:
    """(local copy, URL) of each file that a URL, which may be a glob or a folder, stands for, by name.

    ``choose`` gives those of a folder's files that are data. A URL of local files (`file://`) is copied like any other.

    Raises:
        DataError: there are none, or they cannot be had.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        found = retried(lambda: _listed(system, path, url, choose), url)
        if not found:
            raise DataError(f"{url}: there is no such file")
        return [(_copy(system, name, address), address) for name, address in found]
    except (DataError, StorageError):
        raise
    except ImportError as error:
        raise DataError(f"{url}: {error}; install that package where ranks run") from error
    except FileNotFoundError as error:
        cause: Any = error.__cause__  # fsspec calls every answer of a web server but success this
        if passing(error) or getattr(cause, "status", 404) != 404:
            raise DataError(f"{url} cannot be read: {cause}") from error
        raise DataError(f"{url}: there is no such file") from None
    except Exception as error:  # each file system has errors of its own
        raise DataError(f"{url} cannot be read: {error or type(error).__name__}") from error


def _listed(system: Any, path: str, url: str, choose: Callable[[list[str]], list[str]]) -> list[tuple[str, str]]:
    protocol = url.split("://", 1)[0]
    if any(mark in path for mark in "*?[") and (protocol not in ("http", "https") or "*" in path):
        names = system.glob(path)
    elif protocol not in ("http", "https") and system.isdir(path):
        names = choose([name for name in system.find(path) if not is_hidden(name.removeprefix(path))])
    else:
        names = [path]
    return [(name, url if name == path else str(system.unstrip_protocol(name))) for name in sorted(names)]


def _copy(system: Any, name: str, url: str) -> Path:
    info = retried(lambda: dict(system.info(name)), url)
    version = [info.get(key) for key in ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "sha")]

    def write(file: IO[bytes]) -> None:
        def attempt() -> None:
            file.seek(0)
            file.truncate()
            with system.open(name, "rb", block_size=_BLOCK, cache_type="readahead") as source:
                while block := source.read(_BLOCK):
                    file.write(block)
            if info.get("size") is not None and file.tell() != info["size"]:
                raise ConnectionError(f"{file.tell()} of {info['size']} bytes came")

        retried(attempt, url)

    suffix = "".join(Path(name.split("?", 1)[0]).suffixes[-2:])
    return cached("downloaded", f"1 {url} {version}", suffix, write)
