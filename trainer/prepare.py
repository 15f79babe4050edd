"""`dsft prepare`: tokenises a config's training data once, in processes, into a folder for `data.prepared`.

    python -P -m trainer.prepare CONFIG_JSON FOLDER PROCESSES

Prints one JSON line: path, documents, bytes, kept, seconds. Never imports torch.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import LaunchConfig
from trainer.data.prepared import Writer, batches, identity, matching, write_manifest
from trainer.data.sources import open_source
from trainer.data.workers import Workers
from trainer.failures import UserError, run_tool
from trainer.hub import offline_if_unreachable
from trainer.lease import LockedError, acquire

_PREPARING = ("another `dsft prepare` is writing here", "Wait for it, or give another --output.")


def prepare(config: LaunchConfig, folder: Path, processes: int) -> dict[str, Any]:
    """Encode every document of `data.train` and write it; what is there already, of the same data, is kept.

    Raises:
        UserError: the tokenizer is on the hub, which cannot be reached.
        DataError: a bad record with on_bad_record "error"; the folder holds what was prepared from something else.
        LockedError: another process is writing there.
    """
    from trainer.tokenizer import load_tokenizer

    begin = time.monotonic()
    config = config.altered(data={"prepared": None})
    if problem := offline_if_unreachable(config):
        raise UserError(problem)
    tokenizer = load_tokenizer(config.model)
    sources = [open_source(source) for source in config.data.train]
    of = identity(config, tokenizer, sources)
    report = {"path": str(folder), "documents": sum(source.records for source in sources)}
    if (kept := matching(folder, of)) is not None:  # also where nothing may be written
        return report | _kept(kept)
    with acquire(folder / "lock", held=_PREPARING) as lease:
        if (kept := matching(folder, of)) is not None:  # by the one that was waited for
            return report | _kept(kept)
        writers = []
        with Workers(config, processes) as workers:
            for index, source in enumerate(sources):
                writer = Writer(folder, index)
                for first, last in batches(source):
                    if lease.lost.is_set():
                        raise LockedError(f"{folder}: another `dsft prepare` has taken over: this one came to a halt")
                    writer.write(last - first, workers.encode(index, np.arange(first, last), range(last - first)))
                writer.close()
                writers.append(writer)
        write_manifest(folder, of, writers)
    size = sum(size for writer in writers for _, size in writer.files)
    return report | {"bytes": size, "kept": False, "seconds": round(time.monotonic() - begin, 3)}


def _kept(sources: list[dict[str, Any]]) -> dict[str, Any]:
    return {"bytes": sum(size for source in sources for _, size in source["files"]), "kept": True}


def main() -> int:
    config = LaunchConfig.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return run_tool(lambda: prepare(config, Path(sys.argv[2]), int(sys.argv[3]) or len(os.sched_getaffinity(0))))


if __name__ == "__main__":
    sys.exit(main())
