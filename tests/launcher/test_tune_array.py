"""`tune.array` at the login node: one array for what is missing, never two; programs stand in the place of SLURM's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from slurm_programs import program, program_folder
from tune_inputs import write_inputs

from launcher.tuning import Study, open_study, read_search
from launcher.tuning_array import ensure_submitted, follow, is_task
from trainer.config.errors import ConfigErrors
from trainer.failures import UserError

CLUSTER = {"backend": "slurm", "nodes": 1, "environment": {"NOTE": "seen"}}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs; sbatch notes the scripts that it is given."""
    folder = program_folder(tmp_path, monkeypatch)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    program(folder, "sbatch", f'case "$*" in *--test-only*) ;; *) echo "$*" >> {folder}/submitted; echo 12;; esac')
    program(folder, "squeue", "true")
    return folder


def open_with(folder: Path, cluster: dict[str, Any] = CLUSTER, **tune: Any) -> Study:
    config = write_inputs(folder, array=True, parallel=3, sampler="random", trials=8, **tune)
    return open_study(read_search(config, [f"cluster={json.dumps(cluster)}"]))


def test_one_array_is_submitted_for_what_is_missing(slurm: Path, tmp_path: Path) -> None:
    study, said = open_with(tmp_path), list[str]()
    assert ensure_submitted(study, said.append) == "12"
    folder = tmp_path / "runs/words"
    script = (folder / "job.sbatch").read_text()
    assert "#SBATCH --array=0-7%3\n" in script
    assert f"#SBATCH --output={folder}/job.log.%a\n" in script
    assert f"launcher tune {folder}/array.json)" in script
    assert "0-7%3" in said[0]

    program(slurm, "squeue", "echo '12_0|RUNNING|None|n1|1:00|x'; echo '12_1|PENDING|Priority||1:00|x'")
    assert ensure_submitted(study, said.append) == "12"
    assert "array 12 of this study is in the queue: 1 of its jobs running, 1 waiting" in said[1]
    assert len((slurm / "submitted").read_text().splitlines()) == 1

    # a job has ended its trial, another was killed in the middle of one, and the array is over
    for value in (0.5, None):
        taken = study.take(patient=False)
        assert taken is not None
        trial, lease = taken
        if value is not None:
            study.study.tell(trial, value)
        lease.release()
    program(slurm, "squeue", "echo '12_0|COMPLETED|None|n1|0:00|x'")
    assert follow(study, "12", said.append)
    assert said[2:] == ["trial 0: finished, loss 0.5", "trial 1: running"]
    again = open_study(read_search(folder / "array.json", []))  # what a job reads is the same study
    assert ensure_submitted(again, said.append) == "12"
    assert "#SBATCH --array=0-6%3\n" in (folder / "job.sbatch").read_text()
    assert len((slurm / "submitted").read_text().splitlines()) == 2


def test_what_cannot_work_is_not_submitted(slurm: Path, tmp_path: Path) -> None:
    study = open_with(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "w1"}\n')
    with pytest.raises(UserError, match="completion"):
        ensure_submitted(study, lambda _: None)
    assert not (slurm / "submitted").exists()
    for cluster, message in (
        ({"backend": "local"}, "only SLURM has arrays"),
        ({**CLUSTER, "array": "1-3%1"}, "a chain"),
    ):
        with pytest.raises(ConfigErrors, match=message):
            open_with(tmp_path, cluster)


def test_a_job_of_an_array_knows_itself(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = open_with(tmp_path).search
    assert not is_task(search)
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    assert not is_task(search)  # in salloc: as without an array
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert is_task(search)
