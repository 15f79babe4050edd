"""The training loop of one rank, top to bottom."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainer import checkpoint, collectives
from trainer.config.schema import LaunchConfig
from trainer.data.stream import BatchStream, GlobalBatch, build_evaluation_stream, build_training_stream
from trainer.engine import Engine, init_distributed
from trainer.evaluation import evaluate
from trainer.export import export_run
from trainer.failures import NumericError, StorageError
from trainer.forward import LanguageModelLoss
from trainer.metrics import MetricsLog
from trainer.model import (
    build_model,
    build_optimizer,
    choose_attention,
    output_head_parameters,
    quiet_libraries,
)
from trainer.planning.flops import peak_flops
from trainer.rundir import RunDirectory, cut_torn_tail
from trainer.schedule import learning_rate_factor
from trainer.tasks import get_task
from trainer.tokenizer import load_tokenizer

COLLECTIVE_TIMEOUT_SECONDS = 1800.0
_MAX_SKIPPED_IN_A_ROW = 3
_STOP_POLL_SECONDS = 0.5


def train(run: RunDirectory, attempt: int) -> None:
    """Train, evaluate, checkpoint and export one run, from its newest checkpoint on if there is one."""
    trainer = Trainer(run, attempt)
    try:
        trainer.run_to_end()
    except Exception as error:
        error.step = trainer.step  # type: ignore[attr-defined]  # for the failure record
        raise


class Trainer:
    """One rank of one attempt."""

    step = 0  # completed global batches

    def __init__(self, run: RunDirectory, attempt: int) -> None:
        self.run, self.attempt = run, attempt
        self.config = LaunchConfig.model_validate_json(run.config_path.read_text())
        self.plan: dict[str, Any] = json.loads(run.plan_path.read_text())
        quiet_libraries()
        self.device = init_distributed(self.plan["device"], COLLECTIVE_TIMEOUT_SECONDS)
        if self.config.training.deterministic:
            torch.use_deterministic_algorithms(True)
        self.control = collectives.new_group(COLLECTIVE_TIMEOUT_SECONDS)
        self.gather = collectives.make_gather(collectives.new_group(COLLECTIVE_TIMEOUT_SECONDS))

        tokenizer = load_tokenizer(self.config.model)
        self.task = get_task(self.config, tokenizer)
        import transformers

        model = build_model(
            self.config.model,
            transformers.AutoModelForCausalLM,
            self.plan["deepspeed"],
            choose_attention(self.config.model.attention, self.device),
            self.config.training.seed,
        )
        attention = str(getattr(model.config, "_attn_implementation", "unknown"))
        print(f"{type(model).__name__}, attention: {attention}", flush=True)
        self.head_parameters = output_head_parameters(model)
        on_gpu = self.device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device)) if on_gpu else None
        self.loss = LanguageModelLoss(model, tokenizer.pad_id, attention, self.device)
        optimizer = build_optimizer(model, self.config.training.optimizer)
        self.engine = Engine(model, optimizer, self.plan["deepspeed"])
        self.rank, self.world_size = self.engine.rank, self.engine.world_size
        self.is_main = self.rank == 0

        self.events = run.event_writer(f"rank{self.rank}", attempt)
        self.saver = checkpoint.Saver(run, self.engine, self.config.checkpoint.keep_last, self._published)
        self.last_saved: int | None = None
        self.last_evaluated: int | None = None
        self.data_state: dict[str, Any] | None = None
        self.progress = 0.0
        self.skipped_in_a_row = 0
        self._next_stop_poll = 0.0

    def run_to_end(self) -> None:
        self.resume()
        if self.config.data.packing:
            self.loss.check_isolation(self.engine)
        metrics = self.open_metrics()
        self.engine.train()
        stopped = False
        first = True
        mark = time.monotonic()
        for batch in self.remaining_batches():
            waited = time.monotonic() - mark
            self.step += 1
            line, stopped = self.train_step(batch)
            seconds = time.monotonic() - mark  # with the wait for data: what a step really takes
            line |= {"step_seconds": seconds, "data_seconds": waited, **self.utilisation(batch, seconds)}
            if first and self.is_main:
                self.events.write("first_step", step=self.step)
            first = False
            if metrics and (self.step % self.config.logging.interval_steps == 0 or self.is_last(batch) or stopped):
                metrics.step(line)
            if stopped:
                break
            if self.is_due(self.config.evaluation.interval_steps):
                self.evaluate(metrics)
            if self.is_due(self.config.checkpoint.interval_steps):
                self.save()
            mark = time.monotonic()
        self.finish(metrics, stopped)

    def train_step(self, batch: GlobalBatch) -> tuple[dict[str, Any], bool]:
        """One optimizer step; (the step's metrics, whether to stop after it)."""
        padded_tokens, loss_sum = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        scale = self.world_size / max(batch.target_tokens, 1)  # DeepSpeed averages gradients over ranks
        for micro_batch in batch.micro_batches:
            self.seed_dropout(micro_batch.index)
            micro_loss, padded = self.loss(self.engine.forward, micro_batch.sequences)
            self.engine.backward(micro_loss * scale)
            loss_sum += micro_loss.detach()
            padded_tokens += padded
        learning_rate = self.learning_rate(batch)
        result = self.engine.step(learning_rate)
        total, digest, padded_tokens, stop = collectives.sum_step(
            self.control, float(loss_sum), batch.digest, padded_tokens, self.stop_requested()
        )
        loss = total / max(batch.target_tokens, 1)
        self.data_state, self.progress = batch.state, batch.progress
        self.watch_numerics(loss, result.applied)
        line = {
            "step": self.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "target_tokens": batch.target_tokens,
            "tokens": batch.tokens,
            "padded_tokens": padded_tokens,
            "batch_digest": f"{digest:016x}",
            "progress": batch.progress,
            "total_steps": self.config.training.max_steps,
            "memory_bytes": self.peak_memory(),
        }
        if not result.applied:
            line["skipped"] = True
        return line, stop

    # -- pieces of the loop --------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Load the newest whole checkpoint, if there is one; set damaged ones aside."""
        folder = self.run.checkpoints_dir
        if self.is_main:
            for name in checkpoint.remove_unpublished(folder):
                print(f"removed {name}: it was never published", flush=True)
        candidates = self.run.published_checkpoints() if self.is_main else []
        for step in reversed([int(s) for s in self.gather(np.array(candidates, dtype=np.int64))[0]]):
            path = folder / checkpoint.folder_name(step)
            found = checkpoint.damage(path, lambda index: index % self.world_size == self.rank)
            if found:
                print(f"warning: checkpoint of step {step} is damaged and not used: {found}", flush=True)
            if collectives.any_rank(self.control, found is not None):
                if self.is_main:
                    checkpoint.abandon(path)
                continue
            state = checkpoint.load(path, self.engine)
            self.step = self.last_saved = int(state["step"])
            self.data_state, self.progress = state["data"], float(state["progress"])
            print(f"resumed from {path}", flush=True)
            return

    def remaining_batches(self) -> Iterator[GlobalBatch]:
        """Global batches from here to the end of the training."""
        limit = self.config.training.max_steps
        if limit is not None and self.step >= limit:
            return
        stream: BatchStream = build_training_stream(
            self.config,
            self.task,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.plan["batch"]["micro_batch_size"],
            gather=self.gather,
            state=self.data_state,
            limit=None if limit is None else limit - self.step,
        )
        for batch in stream:
            yield batch
            if limit is not None and self.step >= limit:
                return

    def is_last(self, batch: GlobalBatch) -> bool:
        training = self.config.training
        if training.max_steps is not None:
            return self.step >= training.max_steps
        return training.epochs is not None and batch.progress >= training.epochs

    def is_due(self, interval: int | None) -> bool:
        return interval is not None and self.step % interval == 0

    def learning_rate(self, batch: GlobalBatch) -> float:
        training = self.config.training
        if training.max_steps is not None:
            warmup = training.schedule.warmup_steps
            fraction = (self.step - 1 - warmup) / max(training.max_steps - warmup, 1)
        else:
            assert training.epochs is not None
            fraction = self.progress / training.epochs
        return training.optimizer.learning_rate * learning_rate_factor(training.schedule, self.step, fraction)

    def seed_dropout(self, micro_batch: int) -> None:
        """Dropout masks depend on (seed, step, micro-batch) alone: the same at any world size and after a resume."""
        seeds = np.random.SeedSequence([self.config.training.seed, self.step, micro_batch])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def stop_requested(self) -> bool:
        if not self.is_main or time.monotonic() < self._next_stop_poll:
            return False
        self._next_stop_poll = time.monotonic() + _STOP_POLL_SECONDS
        return self.run.stop_request(self.attempt) is not None

    def watch_numerics(self, loss: float, applied: bool) -> None:
        """A step whose gradients are not finite is skipped by ZeRO; several in a row mean that training is lost."""
        finite = math.isfinite(loss) and applied
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise NumericError(
                f"loss or gradients were not finite in {self.skipped_in_a_row} steps in a row (step {self.step}, loss "
                f"{loss}): lower training.optimizer.learning_rate, or look at the records of these batches"
            )

    def utilisation(self, batch: GlobalBatch, seconds: float) -> dict[str, float]:
        """{"mfu": share of the devices' dense bf16 peak}, where that is known; formula in plan.json.

        The language-model head does not run at positions without a label, so it is not counted there.
        """
        per_token = self.plan["flops_per_token"]
        if self.peak_flops is None or per_token is None:
            return {}
        without_head = 6.0 * self.head_parameters * (batch.tokens - batch.target_tokens)
        flops = per_token * batch.tokens - without_head
        return {"mfu": flops / (seconds * self.world_size * self.peak_flops)}

    def peak_memory(self) -> int:
        """Peak memory of this rank in bytes: the GPU's allocator, or the resident set on CPUs."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def open_metrics(self) -> MetricsLog | None:
        if not self.is_main:
            return None
        cut_torn_tail(self.run.metrics_path)
        return MetricsLog(self.run.metrics_path, self.run.tensorboard_dir if self.config.logging.tensorboard else None)

    def evaluate(self, metrics: MetricsLog | None) -> None:
        if not self.config.data.evaluation or self.last_evaluated == self.step:
            return
        self.last_evaluated = self.step
        start = time.monotonic()
        stream = build_evaluation_stream(
            self.config,
            self.task,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.plan["batch"]["micro_batch_size"],
            gather=self.gather,
        )
        scores = evaluate(self.engine, self.loss, stream, self.control)
        if metrics:
            metrics.evaluation(self.step, scores)
            self.events.write("evaluation", step=self.step, seconds=time.monotonic() - start, **scores)

    def save(self) -> None:
        if self.last_saved == self.step:
            return
        self.last_saved = self.step
        state = {"data": self.data_state, "progress": self.progress, "config_hash": self.plan["config_hash"]}
        stall = self.saver.save(self.step, state)
        if self.is_main:
            self.events.write("checkpoint_started", step=self.step, stall_seconds=stall)

    def _published(self, step: int, seconds: float, size: int) -> None:
        self.events.write("checkpoint", step=step, seconds=seconds, bytes=size)

    def finish(self, metrics: MetricsLog | None, stopped: bool) -> None:
        """Last evaluation, last checkpoint, export."""
        if not stopped:
            self.evaluate(metrics)
        self.save()
        self.saver.wait()
        failed = collectives.any_rank(self.control, self.saver.error is not None)
        if metrics:
            metrics.close()
        if failed:
            raise StorageError(self.saver.error or "another rank could not write its part of the last checkpoint")
        if not self.is_main:
            return
        self.events.write("stopped" if stopped else "trained", step=self.step)
        if not stopped and self.config.export.enabled:
            start = time.monotonic()
            folder = export_run(self.run, self.config, self.step)
            self.events.write("exported", step=self.step, seconds=time.monotonic() - start, path=str(folder))
