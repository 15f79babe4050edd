"""The study of `dsft tune`: Optuna's, with its journal on shared storage, so that many processes work on one study."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.consistency import differences
from launcher.permissions import make_run_directory
from trainer.config.errors import ConfigErrors
from trainer.config.loading import load_config, redacted
from trainer.config.schema import LaunchConfig
from trainer.config.tuning import Categorical, Integer, LogUniform, Parameter, TuneConfig
from trainer.failures import UserError
from trainer.lease import Lease, LockedError, acquire
from trainer.rundir import Json, RunDirectory, cut_torn_tail, read_json, write_json

if TYPE_CHECKING:
    import optuna

_DEFAULT_TRIALS = 20
# What the scores of one study have in common; the rest may change from one `dsft tune` to the next
_SECTIONS = ("task", "model", "data", "training", "evaluation")


@dataclass(frozen=True)
class Search:
    """A config with a `tune` section. `overrides` are the user's `--set`."""

    path: Path
    overrides: tuple[str, ...]
    config: LaunchConfig
    settings: TuneConfig

    @property
    def folder(self) -> Path:
        """Where the study and its trials live."""
        return Path(self.config.output_dir) / self.config.name

    @property
    def metric(self) -> str:
        return self.settings.metric or self.config.evaluation.metric

    @cached_property
    def maximise(self) -> bool:
        evaluation = self.config.evaluation
        if self.metric == evaluation.metric:
            return evaluation.maximise
        return evaluation.model_copy(update={"metric": self.metric, "larger_is_better": "auto"}).maximise

    @property
    def count(self) -> int:
        """How many trials the study is to have."""
        whole = len(self.grid()) if self.settings.sampler == "grid" else _DEFAULT_TRIALS
        wanted = self.settings.trials or whole
        return min(wanted, whole) if self.settings.sampler == "grid" else wanted

    def grid(self) -> list[Json]:
        """Every combination of values as Optuna holds them, in the order of the space."""
        axes = [_values(of) for of in self.settings.space.values()]
        return [dict(zip(self.settings.space, point, strict=True)) for point in itertools.product(*axes)]

    def values(self, params: Json) -> Json:
        """Key -> value for the config, from what Optuna holds."""
        space = self.settings.space
        return {
            key: json.loads(value) if isinstance(space[key], Categorical) else value for key, value in params.items()
        }

    def run(self, number: int) -> RunDirectory:
        return RunDirectory(self.folder / "trials" / f"{number:04d}")

    def trial_overrides(self, run: RunDirectory, values: Json) -> list[str]:
        """`--set` of a trial: the user's own, those that make it a run of the study, then its values."""
        of_study = {
            "tune": None,
            "name": run.name,
            "output_dir": str(run.path.parent),
            "evaluation.metric": self.metric,
            "evaluation.larger_is_better": self.maximise,
        }
        if not self.settings.keep_checkpoints:
            of_study["export.enabled"] = False
        return [*self.overrides, *_sets(of_study), *_sets(values)]

    def best_config(self, values: Json) -> Json:
        """A whole config with these values, without secrets."""
        of_best = {"tune": None, "name": f"{self.config.name[:90]}-best"}
        chosen = {"evaluation.metric": self.metric, "evaluation.larger_is_better": self.maximise}
        return redacted(load_config(self.path, [*self.overrides, *_sets(of_best | chosen), *_sets(values)]))


def _sets(values: Json) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _values(of: Parameter) -> list[Any]:
    """All values of a parameter that can be counted, as Optuna holds them."""
    if isinstance(of, Categorical):
        return [json.dumps(choice) for choice in of.choices]
    assert isinstance(of, Integer)
    return list(range(of.low, of.high + 1, of.step))


def read_search(path: Path, overrides: Sequence[str]) -> Search:
    """Read the config and try every value that the space begins, ends or is made up of.

    Raises UserError for a key that does not exist, a value that the config refuses, and a search that cannot be judged.
    """
    config = load_config(path, overrides)
    if config.tune is None:
        raise UserError(f'{path}: no `tune` section: say what to search, {{"tune": {{"space": ...}}}} (docs/tune.md)')
    if not config.data.evaluation:
        raise UserError(f"{path}: `data.evaluation` is missing: trials are judged by it")
    if config.tune.pruner != "none" and config.evaluation.interval_steps is None:
        raise UserError(
            f"{path}: tune.pruner: trials are compared while they run: set `evaluation.interval_steps`, or pruner none"
        )
    search = Search(Path(os.path.abspath(path)), tuple(overrides), config, config.tune)
    for key, of in config.tune.space.items():
        for value in of.choices if isinstance(of, Categorical) else (of.low, of.high):
            try:
                load_config(path, search.trial_overrides(search.run(0), {key: value}))
            except ConfigErrors as error:
                told = "; ".join(f"{item.path}: {item.message}" if item.path else item.message for item in error.errors)
                raise UserError(f"{path}: tune.space.{key}: with {json.dumps(value)}: {told}") from None
    return search


@dataclass
class Study:
    """The study of a search; several processes may have it open."""

    search: Search
    study: optuna.Study

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """All trials that were begun, by number."""
        from optuna.trial import TrialState

        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def take(self, patient: bool) -> tuple[optuna.Trial, Lease] | None:
        """A trial for this process: one that another has left behind, else a new one; None if there is no more.

        `patient`: wait for a sign of life (10 s) from processes on other machines before their trials are left alone.
        """
        return self._left_behind(patient) or self._new()

    def _lock_dir(self, number: int) -> Path:
        return self.search.folder / "tuners" / f"{number:04d}"

    def _left_behind(self, patient: bool) -> tuple[optuna.Trial, Lease] | None:
        from optuna import Trial
        from optuna.trial import TrialState

        from trainer.lease import read_holder

        for trial in self.trials():
            if trial.state != TrialState.RUNNING:
                continue
            holder = read_holder(self._lock_dir(trial.number))
            if holder is not None and (holder.is_here() or not (patient or holder.is_gone())):
                continue
            try:
                lease = acquire(self._lock_dir(trial.number))
            except LockedError:
                continue
            if self.trials()[trial.number].state == TrialState.RUNNING:
                return Trial(self.study, trial._trial_id), lease
            lease.release()
        return None

    def _new(self) -> tuple[optuna.Trial, Lease] | None:
        from optuna.trial import TrialState

        settings = self.search.settings
        while True:
            with _locked(self.search.folder / "study"):
                known = self.study.get_trials(deepcopy=False)
                waiting = sum(trial.state == TrialState.WAITING for trial in known)
                number = len(known) - waiting
                if number >= self.search.count:
                    return None
                if settings.sampler == "grid" and not waiting:
                    self.study.enqueue_trial(self.search.grid()[number])
                # by number: the same values whoever draws them, and other values after a restart
                self.study.sampler = _sampler(self.search, number)
                trial = self.study.ask({key: _distribution(of) for key, of in settings.space.items()})
                with contextlib.suppress(LockedError):  # taken for left behind by another, in this very moment
                    return trial, acquire(self._lock_dir(trial.number))


def open_study(search: Search) -> Study:
    """Open or create the study. Raises UserError if its folder holds another one, or Optuna is missing."""
    try:
        import optuna
    except ImportError:
        raise UserError("`dsft tune` needs Optuna, which is not installed here: pip install 'optuna>=5.0'") from None
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = search.folder
    if (folder / "config.json").exists():
        raise UserError(f"{folder} is a run, not a study: give the study another `name`")
    journal = folder / "study.journal"
    try:
        make_run_directory(folder, search.config.cluster)
        (folder / "trials").mkdir(exist_ok=True)
        with _locked(journal):
            cut_torn_tail(journal)
        storage = JournalStorage(JournalFileBackend(str(journal), JournalFileOpenLock(str(journal))))
        with _locked(folder / "study"):
            study = Study(
                search,
                optuna.create_study(
                    storage=storage,
                    study_name=search.config.name,
                    direction="maximize" if search.maximise else "minimize",
                    pruner=_pruner(search),
                    load_if_exists=True,
                ),
            )
            _same_study(study)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; change `output_dir`") from error
    return study


def _same_study(study: Study) -> None:
    """Raise UserError if trials with results were of another search; remember this one."""
    search, path = study.search, study.search.folder / "study.json"
    sections = redacted(search.config)
    now = {name: sections[name] for name in _SECTIONS}
    now |= {"metric": search.metric, "maximise": search.maximise}
    now["space"] = {key: of.model_dump(mode="json") for key, of in search.settings.space.items()}
    before = read_json(path)
    if before is not None and any(trial.value is not None for trial in study.trials()):
        changes = [
            f"  {key}: the study has {json.dumps(a)}, the config {json.dumps(b)}"
            for key, a, b in differences("", before, now)
        ]
        if changes:
            told = "\n".join(change.replace("  .", "  ", 1) for change in changes)
            raise UserError(
                f"{search.folder}: the study has trials of another search:\n{told}\n"
                "Give the new search another `name`, or undo the change"
            )
    write_json(path, now, indent=2)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Optuna's own lock (O_EXCL, right on NFS too), for what has to be done by one process at a time."""
    from optuna.storages.journal import JournalFileOpenLock

    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _distribution(of: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(of, Categorical):
        return CategoricalDistribution(_values(of))
    if isinstance(of, Integer):
        return IntDistribution(of.low, of.low + (of.high - of.low) // of.step * of.step, step=of.step)
    return FloatDistribution(of.low, of.high, log=isinstance(of, LogUniform))


def _sampler(search: Search, number: int) -> optuna.samplers.BaseSampler:
    import numpy as np
    from optuna.samplers import RandomSampler, TPESampler

    seed = int(np.random.SeedSequence([search.settings.seed, number]).generate_state(1)[0])
    if search.settings.sampler != "tpe":
        return RandomSampler(seed)
    # a fourth of the trials at random before the model is trusted; trials under way count as bad: not tried twice
    return TPESampler(seed=seed, n_startup_trials=min(10, max(3, search.count // 4)), constant_liar=True)


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    settings, training = search.settings, search.config.training
    if settings.pruner == "none":
        return NopPruner()
    if settings.pruner == "median":
        return MedianPruner(n_startup_trials=min(5, max(2, search.count // 4)))
    known = training.max_steps is not None and "training.max_steps" not in settings.space
    return HyperbandPruner(
        min_resource=search.config.evaluation.interval_steps or 1,
        max_resource=training.max_steps if known and training.max_steps else "auto",
    )


def score(search: Search, run: RunDirectory) -> tuple[int, float]:
    """(step, value) of the model that the run exports: its last, or its best. Raises UserError without the metric."""
    values = [(int(line["step"]), score_of(search, line)) for line in run.evaluation_lines()]
    if not values:
        return 0, math.nan
    if search.config.export.checkpoint == "last":
        return values[-1]
    sign = 1.0 if search.maximise else -1.0
    return max(values, key=lambda item: (not math.isnan(item[1]), sign * item[1], -item[0]))


def score_of(search: Search, line: Json) -> float:
    """The metric in a line of an evaluation."""
    scores = line["evaluation"]
    if search.metric not in scores:
        raise UserError(f"tune.metric: no {search.metric!r} among the scores: {', '.join(sorted(scores))}")
    return float(scores[search.metric])
