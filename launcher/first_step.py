"""`cluster.doctor`: a job examines the nodes that it was given before it trains on them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from launcher.backends.slurm import SlurmBackend
from launcher.doctor import examine
from slurm.hostlist import expand
from trainer.config.schema import LaunchConfig
from trainer.failures import DsftError
from trainer.rundir import RunDirectory


def examine_allocation(
    config: LaunchConfig, backend: SlurmBackend, run: RunDirectory, say: Callable[[str], None]
) -> None:
    """Ask `dsft doctor` about the nodes of this allocation; those with problems are used only if there are no others.

    Each problem is said and goes into the ledger. Nothing that is found ends the run: what really forbids it fails the
    first attempt, after which the job is requeued without those nodes.
    """
    nodes = expand(os.environ["SLURM_JOB_NODELIST"])
    say(f"examining {len(nodes)} node(s)")
    try:
        problems = examine(config, [], 0, lambda _: None).problems
    except DsftError as error:
        problems = (str(error),)
    events = run.event_writer("launch")
    for problem in problems:
        say(f"warning: {problem}")
        events.write("warning", message=problem)
    bad = blamed(problems, nodes)
    for node in bad:
        backend.pool.lose(node, next(problem for problem in problems if node in blamed([problem], nodes)))
    if bad:
        enough = backend.pool.size(len(nodes) - len(bad)) > 0
        say(f"{', '.join(bad)}: " + ("left out" if enough else "used all the same, since there are no others"))


def blamed(problems: Sequence[str], nodes: Sequence[str]) -> list[str]:
    """The nodes of which a problem speaks alone; where it speaks of two, it may be either's or the link's."""
    spoken = ([n for n in nodes if re.search(rf"(?<![\w./-]){re.escape(n)}(?![\w-])", text)] for text in problems)
    return sorted({names[0] for names in spoken if len(names) == 1})
