"""A look into a few steps: PyTorch traces, memory snapshots, and a short text that says where the time goes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from trainer.config.schema import ProfileConfig
from trainer.rundir import RunDirectory

# Kinds of operators and kernels by name (torch's, NCCL's, gloo's, common kernels'); the first match counts
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("communication", re.compile(r"nccl|gloo|c10d::|all_?gather|all_?reduce|reduce_?scatter|broadcast", re.I)),
    ("attention", re.compile(r"attention|flash|fmha|sdpa", re.I)),
    ("matrix products", re.compile(r"gemm|matmul|::mm\b|addmm|::bmm\b|::linear\b|cutlass|nvjet|mkldnn", re.I)),
    ("optimizer", re.compile(r"adam|optimizer|multi_tensor", re.I)),
    ("loss", re.compile(r"cross_entropy|log_softmax|logsumexp|log_sum_exp|nll_loss", re.I)),
    ("copies", re.compile(r"memcpy|memset|copy_|::to\b|_to_copy|::cat\b|::fill_|::zero_", re.I)),
)
OTHER = "other operators"


class Profiler:
    """Profiles the steps that the config names; nothing where it names none, or another rank.

    Args:
        settings: `logging.profile`, or None.
        run, attempt, rank: where the results go: RUN/profile/attempt-NNNN/rankK.*
        device: of this rank.
    """

    def __init__(
        self, settings: ProfileConfig | None, run: RunDirectory, attempt: int, rank: int, device: torch.device
    ) -> None:
        self._settings = settings if settings is not None and rank in settings.ranks else None
        self._folder = run.path / "profile" / f"attempt-{attempt:04d}"
        self._rank, self._device, self._done = rank, device, 0
        self._profile: Any = None

    def after_step(self, seconds: float, data_seconds: float) -> None:
        """Tell that a step has ended, with its time and what of it went into waiting for data."""
        settings = self._settings
        if settings is None:
            return
        self._done += 1
        if self._profile is not None:
            self._seconds += seconds
            self._data_seconds += data_seconds
            if self._done == settings.skip_steps + settings.steps:
                self._stop()
        elif self._done == settings.skip_steps:
            self._start()

    def _start(self) -> None:
        self._seconds = self._data_seconds = 0.0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile = torch.profiler.profile(activities=activities, acc_events=True)
        self._profile.start()

    def _stop(self) -> None:
        assert self._settings is not None
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"rank{self._rank}.trace.json.gz"
        profile.export_chrome_trace(str(trace))
        if self._device.type == "cuda":
            memory: Any = torch.cuda.memory
            memory._dump_snapshot(str(self._folder / f"rank{self._rank}.memory.pickle"))
            memory._record_memory_history(enabled=None)
        text = summary(
            [(event.key, _own_microseconds(event, self._device)) for event in profile.key_averages()],
            self._settings.steps,
            self._seconds,
            self._data_seconds,
        )
        (self._folder / f"rank{self._rank}.txt").write_text(text, encoding="utf-8")
        print(f"{text}trace for https://ui.perfetto.dev: {trace}", flush=True)


def summary(times: Iterable[tuple[str, float]], steps: int, seconds: float, data_seconds: float) -> str:
    """Where the time of some steps went, as a short table.

    Args:
        times: (name, microseconds of its own) of operators, or of kernels on GPUs.
        steps: how many there were.
        seconds: all of them took.
        data_seconds: of these, waiting for data.
    """
    items = [(name, microseconds / 1e6) for name, microseconds in times if microseconds > 0]
    kinds: dict[str, float] = {}
    for name, own in items:
        kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), OTHER)
        kinds[kind] = kinds.get(kind, 0.0) + own
    kinds["waiting for data"] = data_seconds
    idle = seconds - sum(kinds.values())
    if idle > 0:
        kinds["none of these (Python, waiting)"] = idle
    lines = [f"{steps} steps, {seconds / steps:.4g} s each"]
    for kind, own in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"  {kind:<32} {own / steps:>10.4f} s a step  {own / seconds:>6.1%}")
    lines.append("most expensive:")
    for name, own in sorted(items, key=lambda item: -item[1])[:16]:
        lines.append(f"  {name[:60]:<60} {own / steps:>10.4f} s a step")
    return "\n".join(lines) + "\n"


def _own_microseconds(event: Any, device: torch.device) -> float:
    """Time of its own: of kernels where there is a GPU (an operator's own GPU time is that of its kernels)."""
    if device.type != "cuda":
        return float(event.self_cpu_time_total)
    is_kernel = event.device_type == torch._C._autograd.DeviceType.CUDA
    return float(event.self_device_time_total) if is_kernel else 0.0
