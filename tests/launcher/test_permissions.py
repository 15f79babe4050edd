"""Whose a run directory is: the umask and the group of all that launcher, agents and ranks write into it."""

from __future__ import annotations

import grp
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from test_launch import config_file, dsft, folder, other_group  # noqa: F401
from tune_inputs import write_inputs

from launcher.permissions import make_run_directory
from launcher.tuning import open_study, read_search
from trainer.config.schema import LocalCluster
from trainer.failures import UserError
from trainer.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_everything_a_run_writes_has_its_umask_and_group(folder: Path, other_group: str) -> None:  # noqa: F811
    config = config_file(folder, "shared", max_steps=2)
    settings = json.loads(config.read_text())
    settings["cluster"] |= {"umask": "0027", "group": other_group}
    settings["checkpoint"]["interval_steps"] = 1
    config.write_text(json.dumps(settings))
    code, _, errors = dsft(folder, "launch", str(config))
    assert code == 0, errors
    run = RunDirectory(folder / "runs" / "shared")
    assert (run.export_dir / "config.json").exists()
    number = grp.getgrnam(other_group).gr_gid
    for path in [run.path, *run.path.rglob("*")]:
        mode, wanted = path.stat().st_mode, 0o2750 if path.is_dir() else 0o640
        assert (path.stat().st_gid, stat.S_IMODE(mode)) == (number, wanted), f"{path}: {stat.filemode(mode)}"


def test_a_study_is_in_its_group_too(tmp_path: Path, other_group: str) -> None:  # noqa: F811
    open_study(read_search(write_inputs(tmp_path), [f"cluster.group={other_group}"]))
    made = [*(tmp_path / "runs/words").rglob("*")]
    assert {path.name for path in made} >= {"study.journal", "study.json", "trials"}
    assert {path.stat().st_gid for path in made} == {grp.getgrnam(other_group).gr_gid}


@pytest.mark.usefixtures("usual_umask")
def test_a_group_that_is_not_ones_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no group nosuchgroup on this machine"):
        make_run_directory(tmp_path / "run", LocalCluster(group="nosuchgroup"))
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    tmp_path.chmod(0o777)
    for above in tmp_path.parents[:-1]:  # the other user has to get here
        if not above.stat().st_mode & stat.S_IXOTH:
            above.chmod(above.stat().st_mode | stat.S_IXOTH)
    program = (  # another user need not be able to read the checkout: the modules are there before it is one
        "import grp, os, sys; from pathlib import Path; from launcher.permissions import make_run_directory as make;"
        "from trainer.config.schema import LocalCluster; from trainer.failures import UserError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: make(Path(sys.argv[1]), LocalCluster(group='root'))\nexcept UserError as error: print(error)"
    )
    command = [sys.executable, "-P", "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path / "own")], env=environment, capture_output=True, text=True)
    assert "cannot be given to root: you have to be in that group" in done.stdout, done.stderr


@pytest.mark.parametrize("text", ["27", "0777", "rwx", "0o027"])
def test_a_umask_is_octal_digits_and_leaves_the_owner_alone(text: str) -> None:
    with pytest.raises(ValidationError):
        LocalCluster(umask=text)
