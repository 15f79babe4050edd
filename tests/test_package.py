"""The wheel, installed into an environment of its own, far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launcher", "slurm", "trainer")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout gets no build folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", target, source]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = target.glob("dsft-*.whl")
    return path


@dataclass(frozen=True)
class Installation:
    """An environment with dsft, and a working folder with a user's own modules in it."""

    python: Path
    folder: Path

    def run(self, *command: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{self.python.parent}:{environment['PATH']}"
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel in a fresh environment; the libraries that it requires come from this one by a .pth file."""
    base = tmp_path_factory.mktemp("installed")
    venv.create(base / "venv", symlinks=True)
    python = base / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (site,) = (base / "venv/lib").glob("python3*/site-packages")
    # .pth files that lie in that folder (a checkout's, say) are not followed
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    folder = base / "work"
    folder.mkdir()
    for name in (*PACKAGES, "configs"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name}.py was imported')\n")
    return Installation(python, folder)


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sources <= names, sources - names
    data = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in data if path.suffix not in {".py", ".pyc"}} <= names
    for path in (ROOT / "configs").rglob("*.json"):
        name = f"launcher/_data/configs/{path.relative_to(ROOT / 'configs')}"
        assert zipfile.ZipFile(wheel).read(name) == path.read_bytes()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_packages_come_from_the_installation(installed: Installation) -> None:
    code = "import launcher, slurm, trainer; print(launcher.__file__, slurm.__file__, trainer.__file__)"
    result = installed.run(installed.python, "-P", "-c", code)
    assert result.returncode == 0, result.stderr
    assert all(path.startswith(str(installed.python.parent.parent)) for path in result.stdout.split())


def test_help(installed: Installation) -> None:
    result = installed.run("dsft", "--help")
    assert result.returncode == 0, result.stderr
    for verb in ("launch", "plan", "init", "quickstart"):
        assert verb in result.stdout


def test_init_and_plan(installed: Installation) -> None:
    result = installed.run("dsft", "init", "causal-lm", "mine.json")
    assert result.returncode == 0, result.stderr
    starter = json.loads((ROOT / "configs/causal-lm.json").read_text())
    assert json.loads((installed.folder / "mine.json").read_text()) == starter | {"name": "mine"}
    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model |= {"num_attention_heads": 4, "vocab_size": 512}
    override = ["--set", "model.path=null", "--set", f"model.config={json.dumps(model)}"]
    (installed.folder / "tokenizer.json").write_text("{}")
    for name in ("train", "evaluation"):
        (installed.folder / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    command = ("dsft", "plan", "mine.json", *override, "--set", "model.tokenizer=tokenizer.json", "--json")
    result = installed.run(*command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["world_size"] >= 1


def test_quickstart_runs_and_users_modules_do_not_shadow(installed: Installation) -> None:
    """Everything at once from the wheel: corpus, launch on two ranks, export, sample; then a finished run stays so."""
    command = ("dsft", "quickstart", "--set", "training.max_steps=12", "--set", "training.global_batch_size=4")
    command += ("--set", "data.evaluation.0.limit=20", "--set", "training.schedule.warmup_steps=2")
    result = installed.run(*command, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "was imported" not in result.stdout + result.stderr
    run = installed.folder / "dsft-quickstart/runs/quickstart"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) / 3 < losses[0] - 0.5, losses
    assert (run / "export/model.safetensors").is_file()
    assert "after training" in result.stdout
    for place in (f"dsft report {run}", f"tensorboard --logdir {run}/tensorboard", f"{run}/export"):
        assert place in result.stdout

    again = installed.run(*command)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout
