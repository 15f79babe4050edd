"""Whole runs of the trainer, as torchrun starts them: resumes, damage, world sizes, scores and the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import STEPS, copy_run, figures, launch, launch_and_kill, logs, make_run

from trainer.checkpoint_files import differences, list_checkpoints
from trainer.rundir import RunDirectory


def test_a_run_learns_and_leaves_what_it_promises(finished: RunDirectory) -> None:
    lines = finished.step_lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    scores = finished.evaluation_lines()
    assert [line["step"] for line in scores] == [8, 12]
    assert scores[1]["evaluation"]["loss"] < scores[0]["evaluation"]["loss"]
    assert finished.published_checkpoints() == [4, 8, 12]
    # the last one was due, and saved, before the last evaluation
    assert [checkpoint.scores for checkpoint in list_checkpoints(finished)] == [{}, *(s["evaluation"] for s in scores)]
    assert {event["event"] for event in finished.merged_events()} >= {"first_step", "checkpoint", "trained", "exported"}


def test_the_export_is_the_model(finished: RunDirectory, workspace: Path) -> None:
    """Plain transformers gives the logged evaluation loss from the exported folder alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(list(finished.export_dir.glob("*.safetensors"))) > 1  # it is sharded
    model = AutoModelForCausalLM.from_pretrained(finished.export_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(finished.export_dir)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    total, count = 0.0, 0
    for line in (workspace / "test.jsonl").read_text().splitlines():
        record = json.loads(line)
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        whole = [*prompt, *tokenizer(record["completion"], add_special_tokens=False)["input_ids"]]
        whole.append(tokenizer.eos_token_id)
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(whole)):
            total -= float(log_p[place - 1, whole[place]])
            count += 1
    logged = finished.evaluation_lines()[-1]["evaluation"]
    assert logged["target_tokens"] == count
    assert logged["loss"] == pytest.approx(total / count, rel=1e-5)
    assert "| step | loss |" in (finished.export_dir / "README.md").read_text()


def test_resume_at_the_same_world_size_is_bit_for_bit(finished: RunDirectory, tmp_path: Path) -> None:
    """From step 8: the newest checkpoint is damaged, and a save was cut short."""
    run = copy_run(finished, tmp_path / "again")
    newest = next((run.checkpoints_dir / "step-00000012").glob("rank-00001*"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    (run.checkpoints_dir / "step-00000016").mkdir()
    run.metrics_path.write_text(run.metrics_path.read_text() + '{"step": 13, "lo')
    assert launch(run, 2, attempt=2) == 0, logs(run)
    log = logs(run)
    assert "checkpoint of step 12 is damaged" in log
    assert "does not match its checksum" in log
    assert "removed step-00000016" in log
    assert (run.checkpoints_dir / "step-00000012.abandoned-1").is_dir()
    assert run.published_checkpoints() == [4, 8, 12]
    assert figures(run) == figures(finished)
    assert run.evaluation_lines()[-1]["evaluation"] == finished.evaluation_lines()[-1]["evaluation"]
    for file in sorted(finished.export_dir.glob("*.safetensors")):
        assert (run.export_dir / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (3, 2)])
def test_resume_at_another_world_size_differs_by_rounding(
    finished: RunDirectory, workspace: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    """At another stage of ZeRO as well, where frozen weights would be drawn otherwise."""
    run = copy_run(finished, tmp_path / "other")
    shutil.rmtree(run.checkpoints_dir / "step-00000012")
    config = json.loads(run.config_path.read_text())
    steps = config["training"]["max_steps"]
    make_run(run.path, workspace, ranks, sections={"deepspeed": {"zero_stage": stage}}, max_steps=steps)
    assert launch(run, ranks, attempt=2) == 0, logs(run)
    for line, other in zip(figures(run, 9), figures(finished, 9), strict=True):
        assert line[3:] == other[3:]
        assert line[1:3] == pytest.approx(other[1:3], rel=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize(
    "hold",
    [
        "8:1:report",
        *(pytest.param(f"8:{where}", marks=pytest.mark.matrix) for where in ("1:write", "0:collect", "0:manifest")),
        *(pytest.param(f"8:{where}", marks=pytest.mark.matrix) for where in ("0:published", "0:retain")),
    ],
)
def test_a_whole_run_killed_in_the_middle_of_a_save_goes_on_bit_for_bit(
    hold: str, finished: RunDirectory, workspace: Path, tmp_path: Path
) -> None:
    """Every process of it at once. Training has gone on beside the save, and those steps come again."""
    run = make_run(tmp_path / "killed", workspace, 2)
    launch_and_kill(run, 2, hold)
    published = hold.endswith(("published", "retain"))
    assert run.published_checkpoints() == ([4, 8] if published else [4])
    assert launch(run, 2, attempt=2) == 0, logs(run)
    log = logs(run)
    assert f"resumed from {run.checkpoints_dir}/step-{8 if published else 4:08}" in log
    assert ("removed step-00000008: it was never published" in log) == (not published)
    assert run.published_checkpoints() == [4, 8, 12]
    assert figures(run) == figures(finished)
    ends = [one.checkpoints_dir / "step-00000012" for one in (run, finished)]
    assert not [found for found in differences(*ends) if found[0] != "state.config_hash"]


@pytest.mark.matrix
def test_early_stopping_outlasts_a_kill_and_a_stop(workspace: Path, tmp_path: Path) -> None:
    """Killed as it exports, it does not train on; nor is an evaluation lost that a stop came before."""
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal\nfrom trainer import train, worker\n"
        "train.export_run = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nworker.end(worker.main())\n"
    )
    sections = {"evaluation": {"interval_steps": 2, "patience": 1}}
    worse = {"learning_rate": 1.0}
    run = make_run(tmp_path / "early", workspace, 1, sections=sections, optimizer=worse)
    assert launch(run, 1, worker=(str(dying),)) != 0
    assert run.published_checkpoints() == [4], logs(run)
    assert launch(run, 1, 2) == 0, logs(run)
    assert (run.published_checkpoints(), [line["step"] for line in run.evaluation_lines()]) == ([4], [2, 4])
    assert run.export_dir.exists()
    # as if the last evaluation had not been made
    lines = [line for line in run.metrics_path.read_text().splitlines() if not line.startswith('{"step": 4, "eval')]
    run.metrics_path.write_text("".join(f"{line}\n" for line in lines))
    assert launch(run, 1, 3) == 0, logs(run)
    assert (run.published_checkpoints(), [line["step"] for line in run.evaluation_lines()]) == ([4], [2, 4])


def test_a_stop_request_ends_in_a_checkpoint_between_intervals(workspace: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "stopped", workspace, 2)
    run.attempt_dir(1).mkdir(parents=True)
    run.request_stop(1, "cancel")
    assert launch(run, 2) == 0, logs(run)
    step = run.step_lines()[-1]["step"]
    assert step < 4
    assert run.published_checkpoints() == [step]
    assert not run.export_dir.exists()
    assert [event["event"] for event in run.merged_events()][-1] == "stopped"
