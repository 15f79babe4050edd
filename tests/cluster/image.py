"""A container image for the tests: this machine's Python at a path of its own, and the shared libraries it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

PREFIX = "/opt/inside"  # nowhere but in the image
PYTHON = f"{PREFIX}/bin/python3"
_LIBRARY = f"lib/python3.{sys.version_info.minor}"
SITE_PACKAGES = f"{PREFIX}/{_LIBRARY}/site-packages"
_FOLDERS = ("usr/bin", "etc", "dev", "proc", "sys", "tmp", "run", "var/tmp", "root", "home", "mnt", "usr/lib")
_LEFT_OUT = shutil.ignore_patterns("site-packages", "dist-packages", "test", "__pycache__", "config-*")


def build(image: Path, mount_points: tuple[Path, ...]) -> None:
    """Make the root file system in the new folder `image`. Packages are not in it: their folder has to be mounted."""
    python = Path(sys.executable).resolve()
    library = Path(sys.base_prefix) / _LIBRARY
    for folder in (*_FOLDERS, f"{PREFIX}/bin", SITE_PACKAGES, *map(str, mount_points)):
        (image / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
    shutil.copy2(python, image / PYTHON[1:])
    shutil.copytree(library, image / f"{PREFIX}/{_LIBRARY}"[1:], symlinks=True, ignore=_LEFT_OUT, dirs_exist_ok=True)
    for name in ("sh", "env"):
        shutil.copy2(Path(shutil.which(name) or "").resolve(), image / "usr/bin" / name)
    for link in ("bin", "lib", "lib64"):
        (image / link).symlink_to(f"usr/{link.removesuffix('64')}")
    for name, text in (("passwd", "root:x:0:0::/root:/bin/sh\n"), ("group", "root:x:0:\n"), ("hosts", "")):
        (image / "etc" / name).write_text(text)
    (image / "etc/resolv.conf").touch()
    programs = [python, *library.glob("lib-dynload/*.so"), image / "usr/bin/sh", image / "usr/bin/env", *_torch()]
    for found in libraries(programs):
        shutil.copy2(found.resolve(), image / "usr/lib" / found.name)


def libraries(programs: list[Path]) -> set[Path]:
    """The shared libraries of this machine, and the loader, that the programs need."""
    text = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    found = {Path(path) for path in re.findall(r"(?:=>|^)\s+(/\S+) \(", text, re.MULTILINE)}
    return {path for path in found if "site-packages" not in path.parts}


def _torch() -> list[Path]:
    import torch

    return sorted(Path(torch.__file__).parent.glob("lib/*.so"))
