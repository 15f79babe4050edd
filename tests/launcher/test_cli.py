"""The `dsft` command as a process: light, clean errors, and torch out of reach."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from config_samples import complete, runnable, write

from launcher.cli import VERBS
from trainer.config.loading import load_config

ROOT = Path(__file__).parents[2]

# What a login node without them looks like: importing any of these is an error.
BLOCKED = """
import sys
from importlib.machinery import ModuleSpec

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "datasets", "deepspeed"):
            return ModuleSpec(name, self)  # one may ask whether it is there

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is blocked")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def dsft(tmp_path):
    """Runs `dsft` in a process that cannot import torch and its company."""
    write(tmp_path / "blocked/sitecustomize.py", BLOCKED)
    path = os.pathsep.join([str(tmp_path / "blocked"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "COLUMNS": "120"}

    def run(*arguments, **variables):
        return subprocess.run(
            [sys.executable, "-m", "launcher", *map(str, arguments)],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_the_block_blocks(tmp_path, dsft):
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "blocked")}
    result = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "torch is blocked" in result.stderr


def test_a_plan_is_whole_in_a_narrow_terminal(tmp_path, dsft):
    folder = tmp_path / ("a-folder-of-a-long-name" * 4)
    folder.mkdir()
    shown = dsft("plan", runnable(folder), COLUMNS="60").stdout
    assert str(folder) in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())
    memory = shown[shown.index("memory of a rank") : shown.index("DeepSpeed")].splitlines()[1:]
    assert len(memory) > 5
    assert all(re.search(r" [KMGT]iB ", line) and len(line) <= 80 for line in memory)


def test_plan_for_people(tmp_path, dsft):
    result = dsft("plan", runnable(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    for text in (
        "gsm8k-sft",
        "32 sequences = 2 ranks x 2 micro-batches x 8",
        "optimizer states",
        "torchrun --nnodes=1",
    ):
        assert text in result.stdout
    shown = result.stdout
    assert json.loads(shown[shown.index("{\n") : shown.rindex("\n}") + 2])["zero_optimization"]["stage"] == 3


def test_plan_for_programs(tmp_path, dsft):
    result = dsft("plan", runnable(tmp_path), "--json", "--set", "training.micro_batch_size=2", "--set", "name=other")
    plan = json.loads(result.stdout)
    assert (plan["name"], plan["batch"]["micro_batch_size"], plan["problems"]) == ("other", 2, [])
    assert (plan["device"], plan["batch"]["micro_batches_per_rank"]) == ("cpu", 8)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["training.max_stps=1"], "training.max_stps (--set): unknown key; did you mean `training.max_steps`?"),
        (["cluster.processes_per_node=33"], "there are 33 ranks"),
        (["data.train.0.path=gone.jsonl"], "data.train.0.path: there is no file"),
        (["deepspeed.config.optimizer.type=Lamb"], "set training.optimizer instead"),
        (["model.freeze=nothing"], "expected a list"),
    ],
)
def test_user_errors_exit_with_2_and_no_traceback(tmp_path, dsft, overrides, text):
    options = [word for item in overrides for word in ("--set", item)]
    result = dsft("plan", runnable(tmp_path), *options)
    assert result.returncode == 2
    assert text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_a_disk_that_takes_nothing_is_told_without_a_traceback(tmp_path, dsft):
    write(tmp_path / "run/config.json", json.dumps(load_config(runnable(tmp_path)).model_dump(mode="json")))
    write(tmp_path / "run/lock", "")  # no folder, which stops root as well
    result = dsft("checkpoint", "gc", tmp_path / "run")
    assert (result.returncode, result.stderr.count("\n")) == (75, 1)
    assert str(tmp_path / "run/lock") in result.stderr


def test_a_broken_record_is_named_without_a_traceback(tmp_path, dsft):
    write(tmp_path / "run/config.json", '{"name": ')  # as an editor may leave it
    result = dsft("resume", tmp_path / "run")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{tmp_path}/run/config.json is not valid JSON" in result.stderr


def test_names_that_a_terminal_cannot_show(tmp_path, dsft):
    write(tmp_path / "runs/模型/config.json", "{}")
    result = dsft("status", "模型", PYTHONIOENCODING="latin-1")
    assert (result.returncode, result.stderr) == (0, "")
    assert r"\u6a21\u578b: pending" in result.stdout


@pytest.mark.parametrize(("number", "whom", "code"), [(15, "dsft", 143), (9, "its child", 137)])
def test_a_signal_leaves_no_child_and_is_the_exit_code(tmp_path, number, whom, code):
    text = tmp_path / "text.txt"
    os.mkfifo(text)
    train = ["tokenizer", "train", f"--input={text}", "--vocab-size=400", f"--output={tmp_path}/t.model"]
    process = subprocess.Popen([sys.executable, "-m", "launcher", *train], cwd=ROOT)
    while process.poll() is None:
        with contextlib.suppress(OSError):  # until its child reads, which gets nothing
            writer = os.open(text, os.O_WRONLY | os.O_NONBLOCK)
            break
        time.sleep(0.02)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if whom == "dsft" else int(child), number)
    assert process.wait(30) == code
    assert not Path(f"/proc/{child}").exists()
    os.close(writer)


def test_usage_errors(dsft):
    assert dsft().returncode == 2
    assert "invalid choice: 'lunch'" in dsft("lunch").stderr
    assert dsft("plan").returncode == 2


def test_help_and_version(dsft):
    from launcher import __version__

    assert dsft("--version").stdout == f"dsft {__version__}\n"
    text = dsft("--help").stdout
    assert all(verb in text and help_text in " ".join(text.split()) for verb, help_text in VERBS.items())
    for verb in VERBS:
        assert dsft(verb, "--help").returncode == 0, verb


def test_a_reader_that_leaves_early(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "schema"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


def test_output_that_cannot_be_written_is_no_traceback():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "launcher", "schema"], cwd=ROOT, stdout=full, stderr=-1, text=True
        )
    assert (process.returncode, process.stderr) == (
        75,
        "error: the output cannot be written: No space left on device\n",
    )
    closed = ["sh", "-c", 'exec "$0" -m launcher schema >&-', sys.executable]
    process = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_the_launcher_imports_nothing_heavy(tmp_path):
    """`dsft --help` loads neither pydantic nor rich, `dsft plan` not torch; this is what keeps them quick."""
    program = "import sys, launcher.cli as c\ntry: c.main(sys.argv[1:])\nexcept SystemExit: pass\nprint(*sys.modules)"
    for arguments, absent in (
        (["--help"], {"pydantic", "rich", "torch", "asyncio"}),
        (["plan", str(runnable(tmp_path))], {"torch", "transformers", "datasets", "numpy", "deepspeed"}),
    ):
        result = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert not absent & set(result.stdout.splitlines()[-1].split()), result.stderr


def test_it_is_quick(tmp_path):
    """`--help` costs at most 0.15 of `import torch`; plan at most a second. In CPU time: other work may run beside."""

    def seconds(*command):
        times = []
        for _ in range(3):
            before = os.times()
            subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
            after = os.times()
            times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return min(times)

    assert seconds("-m", "launcher", "--help") <= 0.15 * seconds("-c", "import torch")
    assert seconds("-m", "launcher", "plan", str(runnable(tmp_path))) <= 1


def test_schema_describes_what_loads(tmp_path, dsft):
    schema = json.loads(dsft("schema").stdout)
    assert schema["title"] == "dsft config"
    assert "extends" in schema["properties"]
    assert "Tokens per sequence" in schema["$defs"]["DataConfig"]["properties"]["sequence_length"]["description"]
    validate = jsonschema.Draft202012Validator(schema).iter_errors
    good = complete()
    assert list(validate(good)) == []
    assert list(validate({**good, "cluster": "site.json", "$schema": "x"})) == []
    assert list(validate({"extends": "base.json", "name": "a"})) == []
    assert [list(error.absolute_path) for error in validate({**good, "nam": 1})] == [[]]
    assert list(validate({**good, "deepspeed": {"zero_stage": 5}}))


def test_init_writes_a_config_that_loads_and_never_overwrites(tmp_path, dsft):
    result = dsft("init", "causal-lm")
    assert result.returncode == 0
    path = tmp_path / "causal-lm.json"
    assert load_config(path).task.type == "causal-lm"
    path.write_text("mine")
    again = dsft("init", "causal-lm")
    assert again.returncode == 2
    assert "does not overwrite" in again.stderr
    assert path.read_text() == "mine"
    assert dsft("init", "causal-lm", tmp_path / "my run.json").returncode == 0
    assert load_config(tmp_path / "my run.json").name == "my-run"  # as README's commands have it
    assert "there are:" in dsft("init", "nonsense").stderr
