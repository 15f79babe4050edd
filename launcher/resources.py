"""Files that travel with dsft: the starter configs, in a checkout or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from trainer.failures import UserError

PACKAGE = Path(__file__).resolve().parent


def configs_dir() -> Path:
    """The folder of starter configs: `launcher/_data/configs` in a wheel, `configs/` in a checkout."""
    installed = PACKAGE / "_data" / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def starter_config(name: str) -> Path:
    """The path of a starter config by its name without `.json`. Raises UserError, naming those there are."""
    path = configs_dir() / f"{name}.json"
    if not path.is_file():
        known = (
            ", ".join(sorted(file.stem for file in configs_dir().glob("*.json"))) or "none (is dsft installed whole?)"
        )
        raise UserError(f"there is no starter config `{name}`; there are: {known}")
    return path
