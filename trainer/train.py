"""The training loop of one rank, top to bottom."""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainer import collectives, heartbeat
from trainer.attention import choose_attention
from trainer.checkpoint import Saver
from trainer.checkpoint_files import add_scores, exported_step, retention_of
from trainer.config.schema import LaunchConfig
from trainer.data.stream import BatchStream, GlobalBatch, build_training_stream
from trainer.devices import compute_deterministically
from trainer.engine import Engine, in_files, init_distributed
from trainer.evaluation import BEST, OVER, evaluate, evaluation_streams, judge
from trainer.export import export_run
from trainer.failures import NumericError, StorageError
from trainer.fast_tier import FastTier
from trainer.file_memory import FileMemory
from trainer.hub import offline_if_unreachable
from trainer.metrics import MetricsLog
from trainer.model import build_model, build_optimizer, load_model_config, quiet_libraries
from trainer.origin import find_origin
from trainer.profiling import Profiler
from trainer.resuming import resume
from trainer.rollback import roll_back
from trainer.rundir import RunDirectory, cut_torn_tail
from trainer.saving import SavePolicy, tell
from trainer.schedule import learning_rate
from trainer.sequence_parallel import SequenceParallel, one_of_each_group
from trainer.spikes import cause_to_go_back
from trainer.stragglers import Probe
from trainer.tasks import get_task, task_tokenizer
from trainer.usage import Utilisation, peak_memory, peaks_beside_plan

_MAX_SKIPPED_IN_A_ROW = 3
_STOP_POLL_SECONDS = 0.5
_STOP, _SAVE, _PROBE = 1, 2, 4  # what rank 0 asks of all ranks after a step


def train(run: RunDirectory, attempt: int) -> None:
    """Train, evaluate, checkpoint and export one run, from its newest checkpoint on if there is one."""
    Trainer(run, attempt).run_to_end()


class Trainer:
    """One rank of one attempt."""

    step = 0  # completed optimizer steps
    data_group: Any = None

    def __init__(self, run: RunDirectory, attempt: int) -> None:
        self.run, self.attempt = run, attempt
        self.config = LaunchConfig.model_validate_json(run.config_path.read_text())
        self.plan: dict[str, Any] = json.loads(run.plan_path.read_text())
        quiet_libraries()
        offline_if_unreachable(self.config)  # what is in no cache, the library may try for as long as it does
        self.timeout = collectives.timeout_seconds(self.config.resilience)
        self.device = init_distributed(self.plan["device"], self.timeout)
        if self.config.training.deterministic:
            compute_deterministically()
        self.control = collectives.new_group(self.timeout)
        self.gather = collectives.make_gather(self.control)  # of the main thread
        # a group each: both streams may be under way, and ranks need not reach their calls in the same order
        self.open_data_group()
        self.evaluation_gather = collectives.make_gather(collectives.new_group(self.timeout))

        self.task = get_task(self.config, task_tokenizer(self.config))
        self.config = self.task.config  # with what the task has found in the data
        planned = {"gradient_checkpointing": self.plan["recompute"]}
        auto = self.config.model.gradient_checkpointing == "auto"
        chosen, why = choose_attention(self.config, load_model_config(self.config.model), self.device)
        memory = FileMemory.planned(self.plan, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), self.gather)
        with in_files(memory):
            model = build_model(
                self.config.model.model_copy(update=planned if auto else {}),
                self.task.auto,
                self.plan["deepspeed"],
                chosen,
                self.config.training.seed,
                self.task.configure,
            )
        attention = str(getattr(model.config, "_attn_implementation", "unknown"))
        print(f"{type(model).__name__}, attention: {attention} ({why})", flush=True)
        self.loss = self.task.objective(model, attention, self.device)
        self.sharing = self.config.model.sequence_parallel  # ranks that work on the same micro-batches
        if self.sharing > 1:
            self.loss.parallel = SequenceParallel(model, self.sharing, self.timeout)  # type: ignore[attr-defined]
        training = self.config.training
        optimizer = build_optimizer(model, training.optimizer, training.unfreeze)
        self.engine = Engine(model, optimizer, self.plan["deepspeed"], training.ema_decay, memory)
        self.engine.origin = find_origin(self.config.model.path, self.engine, run, self.gather)
        self.rank, self.world_size = self.engine.rank, self.engine.world_size
        self.is_main = self.rank == 0
        self.probe = Probe(self.device)
        per_token = self.plan["flops_per_token"]
        self.profiler = Profiler(self.config.logging.profile, run, attempt, self.rank, self.device)
        self.utilisation = Utilisation(per_token, self.loss.head_parameters, self.world_size, self.device)

        self.events = run.event_writer(f"rank{self.rank}", attempt)
        settings = self.config.checkpoint
        where = settings.fast_dir
        fast = FastTier(where, run, self.rank, self.world_size, self.gather) if where else None
        report = functools.partial(tell, self.events)
        self.saver = Saver(run, self.engine, retention_of(self.config), report, fast=fast)
        self.save_policy = SavePolicy(settings, self.saver, run, attempt, self.world_size) if self.is_main else None
        self.last_saved: int | None = None
        self.last_evaluated: int | None = None
        self.scores: dict[str, float] = {}  # of the last evaluation
        self.data_state: dict[str, Any] | None = None
        self.progress = 0.0
        self.skipped_in_a_row = 0
        # global batches drawn from the stream so far; step -> its batch, of the last steps
        self.batches = 0
        self.batch_of: dict[int, int] = {}
        self.rollbacks, self.left_out = 0, frozenset[int]()
        spike = self.config.training.loss_spike
        self.most_suspects = 1 + (spike.batches_before if spike else 0)
        self.losses: collections.deque[float] = collections.deque(maxlen=spike.window if spike else 0)
        self._next_stop_poll = 0.0

    def run_to_end(self) -> None:
        resume(self)
        if (warning := self.loss.check(self.engine)) and self.is_main:
            print(f"warning: {warning}", flush=True)
            self.events.write("warning", message=warning)
        metrics = self.open_metrics()
        self.engine.train()
        stopped = False
        first = True
        over = self.catch_up(metrics) & OVER
        mark = heartbeat.enter("data", self.step + 1)
        for batch in () if over else self.remaining_batches():
            self.step += 1
            waited = heartbeat.enter("step", self.step) - mark
            line, request = self.train_step(batch)
            stopped = bool(request & _STOP)
            seconds = heartbeat.step_done(mark, waited)  # with the wait for data: what a step really takes
            self.profiler.after_step(seconds, waited)
            line |= {
                "step_seconds": seconds,
                "data_seconds": waited,
                **self.utilisation(batch.tokens, batch.target_tokens, seconds),
            }
            if first and self.is_main:
                self.events.write("first_step", step=self.step, seconds=seconds, data_seconds=waited)
            first = False
            if metrics and (self.step % self.config.logging.interval_steps == 0 or self.is_last(batch) or stopped):
                metrics.step(line)
            if self.go_back(line):
                mark = heartbeat.enter("data", self.step + 1)
                continue
            if stopped:
                break
            judgement = self.evaluate(metrics) if self.is_due(self.config.evaluation.interval_steps) else 0
            if request & _SAVE or judgement & BEST:
                self.save()
            elif self.is_due(self.config.checkpoint.fast_interval_steps):
                self.saver.save_fast(self.step, self.state())
            if judgement & OVER:
                break
            if request & _PROBE:
                self.probe.run()
            mark = heartbeat.enter("data", self.step + 1)
        self.finish(metrics, stopped)

    def train_step(self, batch: GlobalBatch) -> tuple[dict[str, Any], int]:
        """One optimizer step; (the step's metrics, what rank 0 asks for after it)."""
        padded_tokens, loss_sum = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.begin_step(self.step)
        scale = self.world_size / max(batch.target_tokens, 1)  # DeepSpeed averages gradients over ranks
        for micro_batch in batch.micro_batches:
            self.seed_dropout(micro_batch.index)
            micro_loss, padded = self.loss(self.engine.forward, micro_batch.sequences)
            self.engine.backward(micro_loss * scale)
            loss_sum += micro_loss.detach()
            padded_tokens += padded
        rate = learning_rate(self.config.training, self.step, self.progress)
        result = self.engine.step(rate)
        total, digest, padded_tokens, request = collectives.sum_step(
            self.control,
            float(loss_sum),
            batch.digest if self.rank % self.sharing == 0 else 0,
            padded_tokens,
            self.request(),
        )
        loss = total / max(batch.target_tokens, 1)
        self.data_state, self.progress = batch.state, batch.progress
        line = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "target_tokens": batch.target_tokens,
            "tokens": batch.tokens,
            "padded_tokens": padded_tokens,
            "batch_digest": f"{digest:016x}",
            "progress": batch.progress,
            "total_steps": self.config.training.max_steps,
            "memory_bytes": peak_memory(self.device),
        }
        if not result.applied:
            line["skipped"] = True
        return line, request

    def open_data_group(self) -> None:
        """A new process group for the thread that makes batches; that of an older one may be left in a collective."""
        heartbeat.pass_over(self.data_group)
        self.data_group = collectives.new_group(self.timeout)
        self.data_gather = heartbeat.noting_own_time(collectives.make_gather(self.data_group))

    # -- pieces of the loop --------------------------------------------------------------------------------------

    def remaining_batches(self) -> Iterator[GlobalBatch]:
        """Global batches from here to the end of the training, without those that a rollback has left out."""
        limit = self.config.training.max_steps
        while limit is None or self.step < limit:
            rollbacks = self.rollbacks
            for batch in self.open_stream():
                index = self.batches
                self.batches += 1
                if index in self.left_out:
                    self.data_state, self.progress = batch.state, batch.progress
                    continue
                self.batch_of[self.step + 1] = index
                self.batch_of.pop(self.step + 1 - self.most_suspects, None)
                yield batch
                if self.rollbacks != rollbacks or (limit is not None and self.step >= limit):
                    break
            if self.rollbacks == rollbacks:
                return

    def open_stream(self) -> BatchStream:
        """The training data from `data_state` on."""
        limit = self.config.training.max_steps
        ahead = sum(index >= self.batches for index in self.left_out)
        return build_training_stream(
            self.config,
            self.task,
            **self.share(self.data_gather),
            state=self.data_state,
            tokenizer=self.task.tokenizer.fingerprint(),
            limit=None if limit is None else limit - self.step + ahead,
        )

    def share(self, gather: Any) -> dict[str, Any]:
        """Which part of the data is this rank's: the same for those that share sequences."""
        return {
            "rank": self.rank // self.sharing,
            "world_size": self.world_size // self.sharing,
            "micro_batch_size": self.plan["batch"]["micro_batch_size"],
            "gather": one_of_each_group(gather, self.sharing),
        }

    def go_back(self, line: dict[str, Any]) -> bool:
        """After a bad step: load the last checkpoint before it and leave its batches out; False: go on."""
        loss, applied = line["loss"], "skipped" not in line
        cause = cause_to_go_back(self.config.training, self.losses, loss, applied)
        if cause is not None and roll_back(self, cause):
            return True
        self.watch_numerics(loss, applied)
        if math.isfinite(loss):
            self.losses.append(loss)
        return False

    def is_last(self, batch: GlobalBatch) -> bool:
        training = self.config.training
        if training.max_steps is not None:
            return self.step >= training.max_steps
        return training.epochs is not None and batch.progress >= training.epochs

    def is_due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def seed_dropout(self, micro_batch: int) -> None:
        """Dropout masks depend on (seed, step, micro-batch) alone: the same at any world size and after a resume."""
        slices = [self.rank % self.sharing] if self.sharing > 1 else []
        seeds = np.random.SeedSequence([self.config.training.seed, self.step, micro_batch, *slices])
        seed = int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1))
        # not torch.manual_seed: for each kind of device that is not there it looks at the source files of all callers
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def request(self) -> int:
        """What rank 0 asks of all ranks after this step; 0 on the others."""
        save = self.save_policy is not None and self.save_policy.due(self.step)
        return _STOP * self.stop_requested() + _SAVE * save + _PROBE * (self.is_main and self.probe.due())

    def stop_requested(self) -> bool:
        if not self.is_main or time.monotonic() < self._next_stop_poll:
            return False
        self._next_stop_poll = time.monotonic() + _STOP_POLL_SECONDS
        return self.run.stop_request(self.attempt) is not None

    def watch_numerics(self, loss: float, applied: bool) -> None:
        """A step whose gradients are not finite is skipped by ZeRO; several in a row mean that training is lost."""
        finite = math.isfinite(loss) and applied
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not finite and self.config.training.on_nonfinite == "stop":
            raise NumericError(
                f"step {self.step}: loss {loss} or its gradients not finite (training.on_nonfinite: stop)"
            )
        if self.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise NumericError(
                f"loss or gradients were not finite in {self.skipped_in_a_row} steps in a row (step {self.step}, loss "
                f"{loss}): lower training.optimizer.learning_rate, or look at the records of these batches"
            )

    def open_metrics(self) -> MetricsLog | None:
        if not self.is_main:
            return None
        cut_torn_tail(self.run.metrics_path)
        return MetricsLog(self.run.metrics_path, self.run.tensorboard_dir if self.config.logging.tensorboard else None)

    def evaluate(self, metrics: MetricsLog | None) -> int:
        """Score the evaluation data; what follows from it: flags BEST and OVER, the same on all ranks."""
        if not self.config.data.evaluation or self.last_evaluated == self.step:
            return 0
        self.last_evaluated = self.step
        start = heartbeat.enter("evaluation", self.step)
        sets = evaluation_streams(self.config, self.task, **self.share(self.evaluation_gather))
        self.scores = scores = evaluate(self.engine, self.task, self.loss, sets, self.control)
        judgement = 0
        if metrics:
            metrics.evaluation(self.step, scores)
            metrics.samples(self.step, self.task.shown, self.task.signatures)
            self.events.write("evaluation", step=self.step, seconds=time.monotonic() - start, **scores)
            if self.last_saved == self.step:  # by its interval at the end, or as a stop came before the evaluation
                self.saver.wait()
                add_scores(self.run, self.step, scores)
            settings = self.config.evaluation
            judgement = judge(settings, self.run.evaluation_lines(), self.config.checkpoint.keep_best > 0)
        return collectives.largest(self.control, judgement)

    def catch_up(self, metrics: MetricsLog | None) -> int:
        """As `evaluate`, at the step of the checkpoint taken up: what a stop came before, or a kill kept from having
        its effect."""
        settings = self.config.evaluation
        if self.step == 0 or not self.is_due(settings.interval_steps):
            return 0
        lines = [line for line in self.run.evaluation_lines() if line["step"] <= self.step] if self.is_main else []
        done = bool(lines) and lines[-1]["step"] == self.step
        if not collectives.any_rank(self.control, done):
            return self.evaluate(metrics)
        judged = done and settings.metric in lines[-1]["evaluation"]  # else it was chosen later
        return collectives.largest(self.control, judge(settings, lines, False) if judged else 0)

    def save(self) -> None:
        if self.last_saved == self.step:
            return
        heartbeat.enter("checkpoint", self.step)
        self.last_saved = self.step
        stall = self.saver.save(self.step, self.state())
        if self.save_policy:
            tell(self.events, "checkpoint_started", step=self.step, stall_seconds=self.save_policy.saved(stall))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides slices."""
        return {
            "data": self.data_state,
            "progress": self.progress,
            "batches": self.batches,
            "losses": list(self.losses),
            "evaluation": self.scores if self.last_evaluated == self.step else None,
            "config_hash": self.plan["config_hash"],
        }

    def save_last(self) -> None:
        """The checkpoint that the end of a run depends on; tried twice. Raises StorageError."""
        heartbeat.enter("checkpoint", self.step)
        for _ in range(2):
            self.saver.wait()
            problem = self.saver.missing_space() if self.is_main and self.last_saved != self.step else None
            if collectives.any_rank(self.control, problem is not None):
                raise StorageError(problem or "no room for the last checkpoint; rank 0 says more")
            self.save()
            self.saver.wait()
            if not collectives.any_rank(self.control, self.saver.error is not None):
                return
            self.last_saved = None
        raise StorageError(self.saver.error or "another rank could not write its part of the last checkpoint")

    def finish(self, metrics: MetricsLog | None, stopped: bool) -> None:
        """Last evaluation, last checkpoint, export."""
        if not stopped:
            self.evaluate(metrics)
        self.save_last()
        if self.saver.fast:
            self.saver.fast.clear()
        peaks = peaks_beside_plan(self.gather, self.plan, self.device)
        heartbeat.enter("ending", self.step)
        if metrics:
            metrics.close()
        if not self.is_main:
            return
        self.events.write("memory", **peaks)
        self.events.write("stopped" if stopped else "trained", step=self.step)
        if not stopped and self.config.export.enabled:
            start = heartbeat.enter("export")
            folder = export_run(self.run, self.config, exported_step(self.run, self.config))
            self.events.write("exported", step=self.step, seconds=time.monotonic() - start, path=str(folder))
