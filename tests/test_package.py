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


def test_starter_configs_are_found(installed: Installation) -> None:
    code = "from launcher.resources import starter_config as s; print(s('quickstart'))"
    result = installed.run(installed.python, "-P", "-c", code)
    assert "site-packages/launcher/_data/configs/quickstart.json" in result.stdout, result.stderr
