"""The rendered job script: as expected, valid bash, and unable to carry anything but what the config says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.backends.slurm import check_syntax, step_command
from slurm.job import Job, option_value, quote, render, sbatch_options
from trainer.config.clusters import SlurmCluster
from trainer.failures import UserError

GOLDEN = Path(__file__).parent / "job.golden"
SLURM = Path(__file__).parents[2] / "slurm"
JOB = Job(
    "gsm8k", Path("/scratch/a team/runs/gsm8k"), ["/opt/python", "-P", "-m", "launcher", "launch", "c d"], "/opt/d"
)
TAIL = "# -- Run the supervisor"


def cluster(**values: object) -> SlurmCluster:
    return SlurmCluster.model_validate({"backend": "slurm", **values})


def full() -> SlurmCluster:
    """Every option once."""
    return cluster(
        nodes=4,
        spare_nodes=1,
        gpus_per_node=8,
        cpus_per_task=96,
        partition="gpu",
        account="abc",
        qos="high",
        constraint="a100&nvlink",
        time="1-12:00:00",
        memory="0",
        exclusive=True,
        nodelist="n[1-8]",
        exclude="n3",
        dependency="afterok:12",
        reservation="week",
        mail_user="a@example.org",
        mail_type=["END", "FAIL"],
        array="1-10%1",
        requeue=False,
        grace_seconds=600,
        setup=["module load cuda # 12", "source venv/bin/activate"],
        environment={"NCCL_DEBUG": "INFO", "NOTE": "it's 1,2 $(id) `id`\nüñ"},
        pass_environment=["HF_TOKEN"],
        sbatch={"switches": 1, "contiguous": True, "comment": "a b"},
    )


def test_script_is_the_golden_one() -> None:
    assert render(JOB, full()) == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("values", "nodes", "no_kill"),
    [
        ({"nodes": 4}, "4", False),
        ({"nodes": 4, "min_nodes": 4}, "4", False),
        ({"nodes": 4, "min_nodes": 2}, "2-4", True),
        ({"nodes": 4, "min_nodes": 2, "spare_nodes": 1}, "2-5", True),
    ],
)
def test_a_job_asks_for_what_it_can_use(values: dict[str, object], nodes: str, no_kill: bool) -> None:
    """And outlives the loss of a node only where it can go on without."""
    options = sbatch_options(JOB, cluster(**values))
    assert (options["nodes"], "no-kill" in options) == (nodes, no_kill)


@pytest.mark.parametrize("values", [{}, {"setup": ["true"]}, full().model_dump()])
def test_scripts_pass_bash_and_shellcheck(values: dict[str, object], tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(render(JOB, cluster(**{**values, "setup": ["true"] if values.get("setup") else []})))
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_own_batch_lines_end_as_the_template_does() -> None:
    template, own = (SLURM / "job.sbatch").read_text(), (SLURM / "dsft.sbatch").read_text()
    assert own[own.index(TAIL) :] == template[template.index(TAIL) :]
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", SLURM / "dsft.sbatch"], check=True)


@pytest.mark.parametrize(
    ("squeue", "requeues", "asked"),
    [
        ("[ $asked -gt 2 ] && echo RUNNING", True, 3),  # the controller is away at first
        ("echo COMPLETING", False, 1),
        ("false", False, 30),
    ],
)
def test_a_job_requeues_itself_once_slurm_answers(squeue: str, requeues: bool, asked: int, tmp_path: Path) -> None:
    for name, text in (
        ("squeue", f"echo >> {tmp_path}/asked; asked=$(wc -l < {tmp_path}/asked); {squeue}"),
        ("scontrol", f'echo "$@" > {tmp_path}/told; kill $PPID'),
        ("sleep", "exec /bin/sleep 0.01"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = render(Job("a", tmp_path, ["bash", "-c", "exit 75"]), cluster())
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash"], input=script, text=True, env=variables).returncode == 75
    assert (tmp_path / "told").exists() == requeues
    assert len((tmp_path / "asked").read_text()) == asked


@settings(deadline=None)  # a process each, on a machine that may be busy
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_value_reaches_a_process_unchanged(value: str) -> None:
    script = f"export V={quote(value, 'V')}\n"
    assert script.count("\n") == 1
    assert "\r" not in script
    done = subprocess.run(["bash"], input=f"{script}printenv -0 V".encode(), capture_output=True, check=True)
    assert done.stdout.decode() == value + "\0"


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_values_that_no_process_can_have_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"cluster\.environment\.V"):
        render(JOB, cluster(environment={"V": value}))


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\tb", "", "a\\b", "\"'", "a\u200bb"])
def test_options_that_sbatch_would_misread_are_refused(value: str) -> None:
    with pytest.raises(UserError, match="--comment"):
        option_value(value, "comment")


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("nodes", 3, "use cluster.nodes"),
        ("signal", "USR1@9", "use cluster.grace_seconds"),
        ("export", "A=b", "cluster.pass_environment"),
        ("container-image", "i", "use cluster.container"),
        ("ntasks-per-node", 4, "cluster.processes_per_node"),
        ("clusters", "b", "login nodes of that cluster"),
        ("partition", "cpu", "gives this option already"),
        ("--qos", "high", "without dashes"),
        ("x\n#SBATCH --uid", "0", "without dashes"),
    ],
)
def test_extras_that_contradict_are_refused(name: str, value: object, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        sbatch_options(JOB, cluster(partition="gpu", sbatch={name: value}))


@pytest.mark.parametrize(
    ("extras", "asked", "step"),
    [
        ({}, {"gpus-per-node": "8"}, True),
        ({"gres": "gpu:a100:8"}, {"gres": "gpu:a100:8"}, True),
        ({"gpus-per-node": "a100:8"}, {"gpus-per-node": "a100:8"}, True),
        ({"gpus": 32}, {"gpus": "32"}, True),
        ({"gres": "nvme:1"}, {"gres": "nvme:1", "gpus-per-node": "8"}, True),
        ({"gpus-per-node": False}, {}, False),
    ],
)
def test_gpus_are_asked_for_once(extras: dict[str, object], asked: dict[str, str], step: bool) -> None:
    """SLURM refuses them with and without a type; some sites do not give them out at all."""
    config = cluster(nodes=4, gpus_per_node=8, sbatch=extras)
    options = sbatch_options(JOB, config)
    assert {name: value for name, value in options.items() if name.startswith("g")} == asked
    assert ("--gpus-per-node=8" in step_command(config, ["n1"], Path("/r"))) == step


def test_file_names_are_not_expanded() -> None:
    job = Job("a", Path("/scratch/50%j"), ["true"])
    assert sbatch_options(job, cluster())["output"] == "/scratch/50%%j/job.log"


@pytest.mark.parametrize("line", ["export HF_TOKEN=hf_abc", 'WANDB_API_KEY="abc" true', "a\r"])
def test_secrets_and_line_ends_in_setup_are_refused(line: str) -> None:
    with pytest.raises(UserError, match=r"line 1 of cluster\.setup"):
        render(JOB, cluster(setup=[line]))


def test_secrets_by_reference_pass() -> None:
    script = render(JOB, cluster(setup=['export HF_TOKEN="$(cat ~/.hf)"'], pass_environment=["OTHER_TOKEN"]))
    assert 'export HF_TOKEN="$(cat ~/.hf)"' in script
    assert "${OTHER_TOKEN:?" in script


def test_setup_that_is_no_shell_code_is_refused() -> None:
    with pytest.raises(UserError, match=r"cluster\.setup"):
        check_syntax(render(JOB, cluster(setup=["if true"])))


@pytest.mark.parametrize(("line", "code"), [("false", 2), ("true", 0), ("(exit 3) # note", 2)])
def test_a_failing_setup_line_ends_the_job(line: str, code: int) -> None:
    job = Job("a", Path("/r"), ["true"])
    done = subprocess.run(["bash"], input=render(job, cluster(setup=[line])), text=True, capture_output=True)
    assert done.returncode == code
    assert ("line 1 of cluster.setup failed" in done.stderr) == (code == 2)


def test_one_task_a_node() -> None:
    command = step_command(cluster(nodes=2, cpus_per_task=8), ["n1", "n3"], Path("/run"))
    assert {"--nodes=2", "--ntasks=2", "--nodelist=n1,n3", "--cpus-per-task=8"} < set(command)
    assert command[-2:] == ["-m", "launcher.backends.node"]


TASK = "python3 -P -m launcher.backends.node"
BINDS = "--bind=/data:/d --bind=/runs/a"


@pytest.mark.parametrize(
    ("runtime", "image", "arguments", "expected"),
    [
        ("apptainer", "/i.sif", [], f"apptainer exec --pwd=/runs/a --nv {BINDS} /i.sif {TASK}"),
        ("singularity", "/i.sif", ["--rocm"], f"singularity exec --pwd=/runs/a {BINDS} --rocm /i.sif {TASK}"),
        ("charliecloud", "/i", ["--home"], f"ch-run --cd=/runs/a {BINDS} --home /i -- {TASK}"),
        (
            "pyxis",
            "nvcr.io#nvidia/pytorch:26.01-py3",
            ["--container-name=t"],
            "--container-image=nvcr.io#nvidia/pytorch:26.01-py3 --container-workdir=/runs/a --no-container-mount-home "
            f"--container-mounts=/data:/d,/runs/a:/runs/a --container-name=t {TASK}",
        ),
    ],
)
def test_containers_hold_the_agents(
    runtime: str, image: str, arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word by word; with dsft installed in the image, else its checkout is mounted as well."""
    container = {"runtime": runtime, "image": image, "mounts": ["/data:/d"], "arguments": arguments}
    with_gpus = cluster(gpus_per_node=1, container=container, python="/usr/bin/outside")
    monkeypatch.setattr("launcher.backends.slurm.added_root", lambda: None)
    assert " ".join(step_command(with_gpus, ["n1"], Path("/runs/a"))).endswith(f"--wait=0 {expected}")
    monkeypatch.setattr("launcher.backends.slurm.added_root", lambda: Path("/code"))
    mount = ",/code:/code" if runtime == "pyxis" else "--bind=/code"
    assert mount in " ".join(step_command(with_gpus, ["n1"], Path("/runs/a")))


@pytest.mark.parametrize(
    ("values", "folder", "expected"),
    [
        ({"arguments": ["--cleanenv"]}, "/runs/a", "--cleanenv cannot be given"),
        ({"arguments": ["-B", "/x", "--pwd=/x"]}, "/runs/a", "dsft gives it"),
        ({"runtime": "charliecloud", "arguments": ["--cd=/x"]}, "/runs/a", "dsft gives it"),
        ({"runtime": "pyxis", "arguments": ["--container-image=x"]}, "/runs/a", "use cluster.container.image"),
        ({}, "/runs/a,b", "for the ','"),
        ({}, "/runs/a:b", "for the ':'"),
    ],
)
def test_what_no_container_can_carry_is_refused(values: dict[str, object], folder: str, expected: str) -> None:
    container = {"runtime": "apptainer", "image": "/i.sif", **values}
    with pytest.raises(UserError, match=re.escape(expected)):
        step_command(cluster(container=container), ["n1"], Path(folder))


@pytest.mark.parametrize(
    ("runtime", "mount"), [("apptainer", "data"), ("pyxis", "/a,/b"), ("charliecloud", "/a:/b:ro"), ("pyxis", "/a:b")]
)
def test_mounts_that_mean_something_else_are_refused(runtime: str, mount: str) -> None:
    with pytest.raises(ValueError, match=r"mounted|understands"):
        cluster(container={"runtime": runtime, "image": "i", "mounts": [mount]})
