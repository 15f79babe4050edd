"""Going back behind a bad step: the one place that acts on what `trainer.spikes` has found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer import collectives, heartbeat
from trainer.checkpoint_files import abandon_after
from trainer.failures import NumericError, StorageError
from trainer.resuming import load_newest
from trainer.saving import tell
from trainer.spikes import Cause

if TYPE_CHECKING:
    from trainer.train import Trainer


def roll_back(trainer: Trainer, cause: Cause) -> bool:
    """Load the last checkpoint before the suspect steps and leave their global batches out; a collective.

    Returns False, and changes nothing, where there is no such checkpoint.

    Raises:
        NumericError: ``training.max_rollbacks`` are used up.
        StorageError: every checkpoint before the suspect steps is damaged.
    """
    bad_step = trainer.step
    first = max(bad_step - cause.steps + 1, 1)
    suspects = [trainer.batch_of[step] for step in range(first, bad_step + 1) if step in trainer.batch_of]
    print(f"warning: step {bad_step}: {cause.message} (global batches {suspects})", flush=True)
    if trainer.rollbacks >= trainer.config.training.max_rollbacks:
        raise NumericError(
            f"step {bad_step}: {cause.message}, after {trainer.rollbacks} rollbacks (training.max_rollbacks): lower "
            f"training.optimizer.learning_rate, or look at the records of global batches {suspects}"
        )
    heartbeat.enter("checkpoint")
    trainer.saver.wait()
    usable = trainer.is_main and any(step < first for step in trainer.run.published_checkpoints())
    if not collectives.any_rank(trainer.control, usable):
        if trainer.is_main:
            tell(
                trainer.events,
                "rollback_impossible",
                step=bad_step,
                reason=cause.reason,
                message="no checkpoint before",
            )
        return False
    # Set aside first, told last: killed in between, the same steps lead here again
    if trainer.is_main:
        abandon_after(trainer.run, first - 1)
    if not load_newest(trainer, before=first):
        raise StorageError(f"every checkpoint before step {first} is damaged: there is nothing to go back to")
    trainer.rollbacks += 1
    if trainer.saver.fast:
        trainer.saver.fast.token += 1
    trainer.left_out |= set(suspects)
    if trainer.is_main:
        trainer.events.write(
            "rollback",
            step=bad_step,
            to_step=trainer.step,
            reason=cause.reason,
            message=cause.message,
            skipped_batches=suspects,
        )
    trainer.open_data_group()
    return True
