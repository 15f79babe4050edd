"""Where a start, or a way back, takes up training: at the newest whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import collectives, heartbeat
from trainer.checkpoint_files import abandon, damage, folder_name, remove_unpublished
from trainer.saving import tell
from trainer.slices import Slices, load, load_slices
from trainer.spikes import rollbacks_of

if TYPE_CHECKING:
    from trainer.train import Trainer


def resume(trainer: Trainer) -> None:
    """Load the newest whole checkpoint, if there is one; learn from the ledger which batches are left out."""
    if trainer.is_main:
        for name in remove_unpublished(trainer.run.checkpoints_dir):
            print(f"removed {name}: it was never published", flush=True)
    ledger = trainer.run.merged_events() if trainer.is_main else []
    rollbacks, left_out = rollbacks_of(ledger)
    told = trainer.gather(np.array([rollbacks, *sorted(left_out)], dtype=np.int64))[0]
    trainer.rollbacks, trainer.left_out = int(told[0]), frozenset(int(batch) for batch in told[1:])
    load_newest(trainer)


def load_newest(trainer: Trainer, before: int | None = None) -> bool:
    """Load the newest whole checkpoint (of a step less than ``before``); set damaged ones aside."""
    heartbeat.enter("setup")
    published = trainer.run.published_checkpoints() if trainer.is_main else []
    steps = [int(step) for step in trainer.gather(np.array(published, dtype=np.int64))[0]]
    if before is None and _load_fast(trainer, steps[-1] if steps else 0):
        return True
    for step in reversed(steps):
        if before is not None and step >= before:
            continue
        path = trainer.run.checkpoints_dir / folder_name(step)
        found = damage(path, lambda index: index % trainer.world_size == trainer.rank)
        if found:
            print(f"warning: checkpoint of step {step} is damaged and not used: {found}", flush=True)
            tell(trainer.events, "checkpoint_damaged", step=step, message=found)
        if collectives.any_rank(trainer.control, found is not None):
            if trainer.is_main:
                abandon(path)
            continue
        _take_up(trainer, load(path, trainer.engine), path)
        trainer.last_saved = trainer.step
        return True
    return False


def _load_fast(trainer: Trainer, newer_than: int) -> bool:
    """Load the newest checkpoint of the fast tier of which every rank finds its part here, whole; a collective."""
    fast = trainer.saver.fast
    if fast is None:
        return False
    listed = fast.listed(newer_than) if trainer.is_main else []
    for step, token in trainer.gather(np.array(listed, dtype=np.int64).reshape(-1, 2))[0].tolist():
        part = fast.part(step, token)
        if isinstance(part, str):
            print(f"warning: fast checkpoint of step {step} is not used: {part}", flush=True)
        if collectives.any_rank(trainer.control, isinstance(part, str)):
            continue
        assert not isinstance(part, str)
        folder, state = part
        load_slices(Slices(folder, state, trainer.rank), state, folder, trainer.engine)
        _take_up(trainer, state, folder)
        trainer.last_saved = None  # not on shared storage
        return True
    return False


def _take_up(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    trainer.step = int(state["step"])
    trainer.data_state, trainer.progress = state["data"], float(state["progress"])
    trainer.batches = int(state["batches"])
    trainer.batch_of = {trainer.step: trainer.batches - 1}
    trainer.losses.clear()
    trainer.losses.extend(state["losses"])
    trainer.last_evaluated, trainer.skipped_in_a_row, trainer.saver.error = None, 0, None
    print(f"resumed from {path}", flush=True)
