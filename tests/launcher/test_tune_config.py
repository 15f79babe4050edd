"""What `dsft tune` refuses, how values are drawn, and how processes share a study and take over each other's trials."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from tune_inputs import KEY, write_inputs

from launcher.cli import main
from launcher.trials import shown
from launcher.tuning import Search, open_study, read_search, score
from launcher.tuning_report import summary, write_results
from trainer.config.loading import load_config
from trainer.failures import UserError
from trainer.rundir import append_line

BATCH = "training.global_batch_size"


def search_of(folder: Path, *overrides: str, **tune: Any) -> Search:
    return read_search(write_inputs(folder, **tune), overrides)


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        (
            {"space": {"training.learning_rat": {"type": "int", "low": 1, "high": 2}}},
            "training.optimizer.learning_rate",
        ),
        ({"space": {BATCH: {"type": "int", "low": 0, "high": 2}}}, "expected a positive integer"),
        ({"space": {"task.type": {"type": "categorical", "choices": ["causal-lm", "no-task"]}}}, "no-task"),
        ({"space": {KEY: {"type": "normal"}}}, "log_uniform"),
        ({"space": {KEY: {"type": "uniform", "low": 2.0, "high": 1.0}}}, "has to be less"),
        ({"space": {KEY: {"type": "log_uniform", "low": 0.0, "high": 1.0}}}, "a positive number"),
        ({"space": {KEY: {"type": "categorical", "choices": [1.0, 1.0]}}}, "twice"),
        ({"space": {KEY: {"type": "uniform", "low": 0.1, "high": 1.0}}}, "a grid has no end"),
        ({"space": {"evaluation.metric": {"type": "categorical", "choices": ["a"]}}}, "the same for all trials"),
        ({"space": {}}, "at least 1"),
        ({"trails": 8}, "tune.trials"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(tmp_path: Path, tune: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        search_of(tmp_path, **tune)
    assert told in str(refused.value)
    assert "tune" in str(refused.value)


def test_a_search_that_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no `tune` section"):
        search_of(tmp_path, "tune=null")
    with pytest.raises(UserError, match=r"data\.evaluation"):
        search_of(tmp_path, "data.evaluation=[]")
    with pytest.raises(UserError, match="interval_steps"):
        search_of(tmp_path, "evaluation.interval_steps=null", pruner="median")


def test_trials_take_values_metric_and_folder(tmp_path: Path) -> None:
    search = search_of(tmp_path, "data.seed=5", metric="accuracy")
    assert search.maximise
    values = {KEY: 0.25, "training.schedule": {"type": "linear"}}
    trial = load_config(search.path, search.trial_overrides(search.run(7), values))
    assert Path(trial.output_dir, trial.name) == search.folder / "trials" / "0007"
    assert (trial.training.optimizer.learning_rate, trial.training.schedule.type) == (0.25, "linear")
    assert (trial.evaluation.metric, trial.evaluation.maximise, trial.data.seed) == ("accuracy", True, 5)
    assert (trial.tune, trial.export.enabled) == (None, False)
    best = search.best_config(values)
    assert (best["name"], best["export"]["enabled"], best["data"]["seed"]) == ("words-best", True, 5)
    (tmp_path / "best.json").write_text(json.dumps(best))
    assert load_config(tmp_path / "best.json").training == trial.training


def test_the_score_is_that_of_the_model_which_is_exported(tmp_path: Path) -> None:
    last = search_of(tmp_path)
    run = last.run(0)
    run.path.mkdir(parents=True)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5)):
        append_line(run.metrics_path, {"step": step, "evaluation": {"loss": loss}})
    assert score(last, run) == (3, 1.5)
    best = search_of(tmp_path, "export.checkpoint=best", "checkpoint.keep_best=1")
    assert score(best, run) == (2, 1.0)
    with pytest.raises(UserError, match="no 'f1' among the scores: loss"):
        score(search_of(tmp_path, metric="f1"), run)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_values_do_not_depend_on_restarts(tmp_path: Path, sampler: str) -> None:
    space = {
        KEY: {"type": "log_uniform", "low": 1e-5, "high": 1e-1},
        BATCH: {"type": "int", "low": 4, "high": 30, "step": 4},
        "training.schedule": {"type": "categorical", "choices": [{"type": "linear"}, {"type": "cosine"}]},
    }

    def drawn(name: str, restart: bool) -> list[dict[str, Any]]:
        search = search_of(tmp_path, f"name={name}", sampler=sampler, space=space, trials=8)
        study = open_study(search)
        found = []
        for _ in range(8):
            study = open_study(search) if restart else study
            taken = study.take(patient=False)
            assert taken is not None
            found.append(search.values(taken[0].params))
            study.study.tell(taken[0].number, abs(found[-1][KEY] - 1e-3))
        assert study.take(patient=False) is None
        return found

    first = drawn("a", restart=False)
    assert first == drawn("b", restart=True)
    assert len({json.dumps(values) for values in first}) == 8
    assert all(1e-5 <= values[KEY] <= 1e-1 and values[BATCH] in range(4, 29, 4) for values in first)
    assert all(set(values["training.schedule"]) == {"type"} for values in first)


_TAKE = """
import sys
from pathlib import Path
from launcher.tuning import open_study, read_search
study = open_study(read_search(Path(sys.argv[1]), ()))
while (taken := study.take(patient=False)) is not None:
    if sys.argv[2] == "keep":
        print(taken[0].number, flush=True)
        sys.stdin.read()
    study.study.tell(taken[0].number, 1.0)
    print(taken[0].number, flush=True)
"""


def taker(config: Path, how: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", _TAKE, str(config), how]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_grid_and_one_takes_over_what_another_left(tmp_path: Path) -> None:
    config = write_inputs(tmp_path, space={BATCH: {"type": "int", "low": 1, "high": 12}})
    stuck = taker(config, "keep")
    assert stuck.stdout is not None
    assert stuck.stdout.readline() == "0\n"
    both = [taker(config, "all") for _ in range(2)]
    numbers = [int(line) for process in both for line in process.communicate(timeout=60)[0].split()]
    assert sorted(numbers) == list(range(1, 12))  # each once, and none that somebody is at
    study = open_study(read_search(config, ()))
    assert study.take(patient=True) is None
    assert not summary(study)["finished"]

    stuck.kill()
    stuck.wait()
    with open(tmp_path / "runs/words/study.journal", "ab") as journal:
        journal.write(b'{"op_code": 5, "trial')  # what a kill leaves of a line
    study = open_study(read_search(config, ()))
    taken = study.take(patient=False)
    assert taken is not None
    assert taken[0].number == 0
    study.study.tell(0, 0.5)
    assert study.take(patient=True) is None
    assert sorted(trial.params[BATCH] for trial in study.trials()) == list(range(1, 13))
    value = summary(study)
    assert value["finished"]
    assert value["best"]["number"] == 0


def test_who_finds_no_more_trials_has_done_its_part(tmp_path: Path) -> None:
    """As a job of an array whose trial has ended, while others go on elsewhere."""
    config = write_inputs(tmp_path)
    study = open_study(read_search(config, []))
    ended, elsewhere = study.take(patient=False), study.take(patient=False)
    assert ended is not None
    assert elsewhere is not None
    study.study.tell(ended[0], 0.5)
    assert main(["tune", str(config)]) == 0


def test_a_study_stays_the_same_search_once_it_has_results(tmp_path: Path) -> None:
    study = open_study(search_of(tmp_path))
    taken = study.take(patient=False)
    assert taken is not None
    open_study(search_of(tmp_path, "training.max_steps=70"))  # nothing to compare with yet
    study.study.tell(taken[0].number, 1.0)
    with pytest.raises(UserError, match=r"training\.max_steps: the study has 70, the config 60"):
        open_study(search_of(tmp_path))
    open_study(search_of(tmp_path, "training.max_steps=70", "tune.parallel=2", "resilience.max_restarts=1"))


def test_results_show_every_trial_and_escape_what_is_from_outside(tmp_path: Path) -> None:
    space = {
        KEY: {"type": "log_uniform", "low": 1e-5, "high": 1e-1},
        "task.type": {"type": "categorical", "choices": ["causal-lm"]},
    }
    study = open_study(search_of(tmp_path, sampler="random", space=space, trials=3))
    for number, value in enumerate((2.0, None, 1.0)):
        taken = study.take(patient=False)
        assert taken is not None
        if value is None:
            taken[0].set_user_attr("class", "out_of_memory")
            taken[0].set_user_attr("message", "<b>no room</b>")
        study.study.tell(number, value, TrialState.FAIL if value is None else None)
    value = write_results(study)
    assert [trial["state"] for trial in value["trials"]] == ["finished", "failed", "finished"]
    assert value["best"]["number"] == 2
    best = load_config(tmp_path / "runs/words/best.json")
    assert best.training.optimizer.learning_rate == value["trials"][2]["values"][KEY]
    page = Path(value["html"]).read_text()
    assert "&lt;b&gt;no room" in page
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace('http-equiv="', "")


def test_values_are_shown_as_a_config_has_them() -> None:
    assert shown({"training.schedule": {"type": "cosine"}, "a": 0.123456, "b": 8}) == (
        'training.schedule {"type": "cosine"}, a 0.1235, b 8'
    )
