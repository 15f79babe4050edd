"""torchrun's elastic agent with the few changes that `trainer.agent` needs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from trainer import flight_recorder
from trainer.heartbeat import STACK_SIGNAL

if TYPE_CHECKING:
    from trainer.agent import Report

RENDEZVOUS_TIMEOUT_SECONDS = 600
_POLL_SECONDS = 0.05


def run_ranks(
    options: argparse.Namespace,
    command: Sequence[str],
    victim_seconds: float,
    log: Report,
    stacks_asked: Callable[[], None],
) -> None:
    """Run `command` as every rank of this node and return when none is left; `log` is told how each ended.

    `options` are torchrun's: nnodes, nproc_per_node, node_rank, master_addr, master_port, rdzv_id. `stacks_asked` is
    called once the ranks have been asked for their stacks. Raises torch's SignalException when this process is told to
    stop; the ranks are dead by then.
    """
    rendezvous = _Rendezvous(
        options.master_addr,
        options.master_port,
        options.node_rank,
        options.nnodes,
        options.rdzv_id,
        RENDEZVOUS_TIMEOUT_SECONDS,
    )
    spec = WorkerSpec(
        role="default",
        local_world_size=options.nproc_per_node,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=rendezvous,
        max_restarts=0,
        monitor_interval=_POLL_SECONDS,
    )
    # torch names the last rank to die, here one that this agent has killed; the report names the first
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    agent = Agent(spec, victim_seconds, log)

    def ask_for_stacks(*_: object) -> None:
        agent.ask_for_stacks()
        stacks_asked()

    signal.signal(STACK_SIGNAL, ask_for_stacks)
    agent.run()


class _Rendezvous(StaticTCPRendezvous):
    """Static rendezvous that takes any free port where the port is 0: no other process can snatch it in between."""

    def next_rendezvous(self) -> RendezvousInfo:
        info = super().next_rendezvous()
        if self.master_port == 0:
            assert self._store is not None
            self.master_port = self._store.port  # type: ignore[attr-defined]
        store_info = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(info.store, info.rank, info.world_size, store_info)


class Agent(LocalElasticAgent):
    """Notes the order in which ranks fail, and kills the rest soon instead of asking them for 30 s."""

    def __init__(self, spec: WorkerSpec, victim_seconds: float, log: Report) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))  # else an empty folder stays in TMPDIR
        self._victim_seconds = victim_seconds
        self._log = log

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self._note_ended():
            deadline = time.monotonic() + self._victim_seconds
            while len(self._log.exit_codes) < len(self._ranks()) and time.monotonic() < deadline:
                time.sleep(0.01)
                self._note_ended()
            self._kill()
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _ranks(self) -> dict[int, Any]:
        """Rank -> its subprocess.Popen."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return {
            worker.global_rank: handlers[worker.local_rank].proc for worker in self._worker_group.workers if handlers
        }

    def ask_for_stacks(self) -> None:
        """Have every rank of this node write the stacks of its threads; one that is suspended will not."""
        ranks = self._ranks()
        flight_recorder.ask(os.getpid(), ranks)
        for process in ranks.values():
            process.send_signal(STACK_SIGNAL)

    def _note_ended(self) -> bool:
        """Note the ranks that have ended by themselves; True if one of them failed."""
        failed = False
        for rank, process in self._ranks().items():
            code = process.poll()
            if code is not None:
                self._log.note(rank, code)
                failed = failed or code != 0
        return failed

    def _kill(self) -> None:
        """Kill what is left of every rank's process group: also what a dead rank has left behind."""
        self._note_ended()
        ranks = self._ranks()
        for process in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for rank, process in ranks.items():
            if rank not in self._log.exit_codes:
                self._log.killed.append(rank)
                self._log.note(rank, process.wait())
        flight_recorder.clear(os.getpid(), ranks)

    def _shutdown(self, *args: Any, **kwargs: Any) -> None:
        # Ranks do nothing on SIGTERM but die, and one that is suspended or stuck would not even do that
        self._kill()
        super()._shutdown(*args, **kwargs)
