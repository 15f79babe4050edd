"""The style that the project asks of itself: formatter, linter, types, file sizes, and which way imports run."""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launcher", "slurm", "trainer")
HEAVY = {"torch", "transformers", "datasets", "deepspeed", "tensorboard", "accelerate", "peft"}
MAX_LINES = 420


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def own(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


def module_file(module: str) -> Path | None:
    """The file of one of dsft's modules, None if there is no such module (a function of one, say)."""
    stem = ROOT / module.replace(".", "/")
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path, everywhere: bool) -> frozenset[str]:
    """Modules that a file imports: when it is itself imported, or `everywhere`, inside functions too."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: relative imports are not used here"
            assert node.level == 0, f"{path}: relative imports are not used here"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return frozenset(found)


def with_parents(modules: frozenset[str]) -> set[str]:
    """`a.b.c` also runs `a` and `a.b`."""
    return {".".join(parts[: k + 1]) for parts in (m.split(".") for m in modules) for k in range(len(parts))}


def chain_to_heavy(start: Path) -> list[str] | None:
    """Own modules imported one from another, ending in a heavy library; None if none is reached.

    dsft's light packages must not import one in any place; the trainer's modules that they use, not when imported.
    """
    light = module_name(start).partition(".")[0] != "trainer"
    pending, seen = [(start, [module_name(start)])], {start}
    while pending:
        path, chain = pending.pop()
        is_light = module_name(path).partition(".")[0] != "trainer"
        for module in sorted(with_parents(imports(path, everywhere=light and is_light))):
            if module.partition(".")[0] in HEAVY:
                return [*chain, module]
            target = module_file(module) if own(module) else None
            if target and target not in seen:
                seen.add(target)
                pending.append((target, [*chain, module]))
    return None


@pytest.mark.parametrize(
    "tool", [["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]], ids=["format", "lint", "types"]
)
def test_tools_are_content(tool: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_shell_scripts() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [ROOT / "bootstrap.sh", ROOT / ".ci/run", *sorted((ROOT / "tests").rglob("*.sh"))]
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_files_stay_readable_in_one_go() -> None:
    files = [*python_files(*PACKAGES, "tests", "benchmarks"), ROOT / "setup.py"]
    long = {
        str(path.relative_to(ROOT)): count
        for path in files
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"split these by concern, {MAX_LINES} lines at most: {long}"


@pytest.mark.parametrize("path", python_files("launcher", "slurm"), ids=lambda path: str(path.relative_to(ROOT)))
def test_launcher_and_slurm_never_import_heavy_libraries(path: Path) -> None:
    chain = chain_to_heavy(path)
    assert chain is None, f"{' -> '.join(chain or [])}: the launcher has to start in a blink, without torch"


@pytest.mark.parametrize("path", python_files("trainer"), ids=lambda path: str(path.relative_to(ROOT)))
def test_trainer_imports_neither_launcher_nor_slurm_and_deepspeed_in_one_place(path: Path) -> None:
    roots = {module.partition(".")[0] for module in imports(path, everywhere=True)}
    assert not roots & {"launcher", "slurm"}, "arrows run from launcher to trainer, never back"
    if path != ROOT / "trainer/engine.py":
        assert "deepspeed" not in roots, "only trainer/engine.py imports DeepSpeed"


def test_slurm_does_not_import_launcher() -> None:
    for path in python_files("slurm"):
        assert not {m for m in imports(path, everywhere=True) if m.partition(".")[0] == "launcher"}, path


def test_the_import_walk_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk itself, on a small house built wrong in three ways."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    sources = {
        "launcher/__init__.py": "",
        "launcher/lazy.py": "def f():\n    import torch.nn\n",
        "launcher/far.py": "from trainer.light import g\n",
        "launcher/fine.py": "from trainer.lazy import h\n",
        "trainer/__init__.py": "",
        "trainer/light.py": "from trainer import heavy\n",
        "trainer/heavy.py": "from transformers import AutoModel\n",
        "trainer/lazy.py": "def h():\n    import datasets\n",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert chain_to_heavy(tmp_path / "launcher/lazy.py") == ["launcher.lazy", "torch"]
    assert chain_to_heavy(tmp_path / "launcher/far.py") == [
        "launcher.far",
        "trainer.light",
        "trainer.heavy",
        "transformers",
    ]
    assert chain_to_heavy(tmp_path / "launcher/fine.py") is None


def test_constraints_pin_every_requirement() -> None:
    """A fresh machine gets exactly the versions that the tests run with."""
    requirements = re.findall(r'"([a-z0-9-]+)>=', (ROOT / "setup.py").read_text())
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    optional = {"flash-attn"}  # built for one GPU and one CUDA version, so not pinned
    missing = set(requirements) - pinned - optional
    assert len(requirements) > 10
    assert not missing, f"add these to constraints.txt: {missing}"


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_documents_name_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = {(ROOT / document).parent / link for link in re.findall(r"\]\(([^):#]+)[)#]", text)}
    named = {ROOT / name for name in re.findall(r"`((?:tests|docs|configs|benchmarks)/[\w./-]+\.\w+)`", text)}
    missing = [str(path) for path in sorted(links | named) if not path.exists()]
    assert not missing, f"{document} names what is not there: {missing}"
