"""`dsft launch CONFIG`: run a config to its end."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from launcher.gate import CheckProcess
    from launcher.supervisor import Result
    from trainer.config.schema import LaunchConfig, SlurmCluster
    from trainer.lease import Holder, Lease
    from trainer.rundir import RunDirectory

_STARTED = time.time()  # as good as the process's start, which `exec` in a script puts before all of that script
_GRACE_SECONDS = 60.0  # between two looks at how long steps and checkpoints take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    from launcher.options import add_config

    add_config(parser)
    add_ways(parser)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)  # of `launcher.detach`
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)  # of `launcher.trials`
    parser.add_argument("--parent-stops", action="store_true", help=argparse.SUPPRESS)


def add_ways(parser: argparse.ArgumentParser) -> None:
    """Declare how to launch."""
    parser.set_defaults(ready_fd=None, parent_pid=None, parent_stops=False)
    parser.set_defaults(nodes=None)  # a dry run is `dsft plan`
    parser.add_argument("--dry-run", action="store_true", help="show what would run; create nothing")
    parser.add_argument("--json", action="store_true", help="print JSON: the plan of a dry run, else the final report")
    parser.add_argument(
        "--profile", action="store_true", help="look into a few steps: traces and where the time goes, in RUN/profile"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--watch", action="store_true", help="on SLURM: follow the job (Ctrl-C leaves it alone)")
    group.add_argument("--detach", action="store_true", help="elsewhere: return once the ranks start, and let it run")


def run(options: argparse.Namespace) -> int:
    """Launch; returns the exit code (docs/architecture.md)."""
    from launcher.commands import plan as plan_command
    from launcher.facts import gather_facts
    from launcher.permissions import apply_umask, make_run_directory
    from launcher.preflight import preflight
    from launcher.relief import planned
    from trainer.config.loading import load_config, redacted
    from trainer.failures import EXIT_DONE
    from trainer.rundir import RunDirectory

    if options.parent_pid is not None:
        from trainer.processes import die_with_parent

        die_with_parent(options.parent_pid)
    if options.parent_stops:  # by INT; what all processes were sent as well would be a second signal, and mean at once
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if options.profile:
        options.set = ["logging.profile={}", *options.set]
    if options.dry_run:
        return plan_command.run(options)
    config = load_config(options.config, options.set)
    apply_umask(config.cluster)
    target = RunDirectory(Path(config.output_dir) / config.name)
    if _is_finished(target, redacted(config), options.json):  # whatever has become of its data, its model or a disk
        return EXIT_DONE
    facts = gather_facts(config)
    plan = planned(config, facts)
    preflight(config, plan, facts)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    gpus = [gpu.name for gpu in facts.gpus]
    if options.detach and config.cluster.backend != "slurm":
        from launcher.detach import detach

        with _writing(target):
            make_run_directory(target.path, config.cluster)
        words = [str(options.config), *(word for value in options.set for word in ("--set", value))]
        return detach(words, target, options.json)
    return launch(config, plan.to_json() | {"gpus": gpus}, target, options.json, options.watch, options.ready_fd)


def launch(
    config: LaunchConfig,
    plan: dict[str, Any],
    target: RunDirectory,
    as_json: bool,
    watch: bool = False,
    ready_fd: int | None = None,
) -> int:
    """Run `config` in `target` under its lock, show how it goes, and print the account at the end."""
    from launcher.console import if_anybody_reads, printable
    from launcher.gate import CheckProcess
    from launcher.permissions import make_run_directory
    from launcher.supervisor import gone
    from trainer.config.loading import redacted
    from trainer.failures import EXIT_DONE, StorageError
    from trainer.lease import acquire

    if config.cluster.backend == "slurm":
        from launcher.backends.slurm import in_allocation

        if not in_allocation():
            return _submit(config, config.cluster, plan, target, as_json, watch)
    environment = _rank_environment(config, plan)
    resolved = redacted(config)
    with _writing(target):
        make_run_directory(target.path, config.cluster)
        lease = acquire(target.lock_dir, _tell_waiting)
    with lease:
        if _is_finished(target, resolved, as_json):  # by the launch that was waited for
            return EXIT_DONE
        with _writing(target):
            _write_records(target, resolved, plan)
        target.event_writer("launch").write("launched", started=_STARTED)
        gate = CheckProcess(target.config_path)
        try:
            stream = sys.stderr if as_json else sys.stdout
            result = _supervise(config, plan, target, lease, gate, environment, stream, ready_fd)
        except OSError as error:
            if not target.exists():
                raise StorageError(gone(target)) from error
            raise StorageError(f"{error.filename or target.path}: {error.strerror or error}") from error
        finally:
            gate.cancel()
    if not target.exists():  # as the reason says; a report would claim that there never was a run
        raise StorageError(gone(target))
    _write_html(target)
    _print_account(target, as_json)
    if result.verdict.outcome == "failed":
        with if_anybody_reads(sys.stderr):
            print(f"error: {printable(result.verdict.message)}", file=sys.stderr)
    if config.cluster.backend == "slurm":
        from launcher.requeue import exit_code

        return exit_code(result.action, target, config.cluster, config.resilience.bad_node_hours)
    return result.action.exit_code


def _submit(
    config: LaunchConfig,
    cluster: SlurmCluster,
    plan: dict[str, Any],
    target: RunDirectory,
    as_json: bool,
    watch: bool,
) -> int:
    """Check everything, submit the job that will launch this run in its allocation, and print the job's id.

    `watch`: follow it then, or the run's job that is in the queue already.
    """
    from launcher.backends.slurm import job_of, submit
    from launcher.consistency import differences
    from launcher.gate import checked
    from launcher.grace import grace_problem
    from launcher.jobs import base_id, one_at_a_time, refuse_second_job, waiting_job
    from launcher.permissions import make_run_directory
    from trainer.config.loading import redacted
    from trainer.failures import EXIT_DONE
    from trainer.lease import acquire
    from trainer.rundir import read_json

    if watch and (job_there := waiting_job(target)) is not None:
        before = read_json(target.config_path)
        if others := [path.strip(".") for path, _, _ in differences("", before, redacted(config))]:
            print(
                f"warning: job {base_id(job_there)} was submitted with other values of {', '.join(others)}; for those "
                f"of now, `dsft cancel {target.path}` and launch again",
                file=sys.stderr,
            )
        return _follow(target, base_id(job_there), as_json)
    with _writing(target):
        make_run_directory(target.path, cluster)
        with one_at_a_time(target):
            refuse_second_job(target)
            # it may go on where no job of its own tells: in an allocation made by hand, on another host without SLURM
            with acquire(target.lock_dir, _tell_waiting):
                _write_records(target, redacted(config), plan)
                warnings = checked(target.config_path)
            problem = grace_problem(target, cluster)
            for warning in (*warnings, *([problem] if problem else [])):
                print(f"warning: {warning}", file=sys.stderr)
            job = job_of(target, config.name, cluster)
            job_id = submit(job, cluster)
            target.event_writer("submission").write("submitted", job_id=job_id, backend="slurm")
    value = {"run": str(target.path), "job_id": job_id, "script": str(job.script_path), "log": str(job.log_path)}
    text = f"submitted job {job_id}: {job.script_path}, output in {job.log_path}"
    if watch:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)
        return _follow(target, job_id, as_json)
    print(json.dumps(value) if as_json else text)
    return EXIT_DONE


def _follow(target: RunDirectory, job_id: str, as_json: bool) -> int:
    from launcher.follow import follow

    code = follow(target, job_id, sys.stderr if as_json else sys.stdout)
    _print_account(target, as_json)
    return code


def _is_finished(target: RunDirectory, resolved: dict[str, Any], as_json: bool) -> bool:
    """Say so if the run is finished; raises UserError if it is another run than the config describes."""
    from launcher.consistency import refuse_changes
    from launcher.console import if_anybody_reads
    from launcher.state import run_state

    refuse_changes(target, resolved)
    if run_state(target).state != "finished":
        return False
    stream = sys.stderr if as_json else sys.stdout
    with if_anybody_reads(stream):
        print(f"{target.path}: this run is finished already", file=stream)
    _print_account(target, as_json)
    return True


def _write_records(target: RunDirectory, resolved: dict[str, Any], plan: dict[str, Any]) -> None:
    from launcher.environment import describe_environment
    from launcher.registry import register
    from trainer.processes import package_root
    from trainer.retry import retried
    from trainer.rundir import write_json

    def write() -> None:
        write_json(target.config_path, resolved, indent=2)
        write_json(target.plan_path, plan, indent=2)
        write_json(target.environment_path, environment, indent=2)
        register(target)

    environment = describe_environment(package_root(), plan.get("gpus"))
    retried(write, str(target.path))


def _supervise(
    config: LaunchConfig,
    plan: dict[str, Any],
    target: RunDirectory,
    lease: Lease,
    gate: CheckProcess,
    environment: dict[str, str],
    stream: TextIO,
    ready_fd: int | None,
) -> Result:
    """The run itself, with its progress and its end told on `stream`."""
    from launcher.notify import Notifier
    from launcher.place import open_place
    from launcher.relief import Relief
    from launcher.supervisor import Supervisor
    from launcher.watch import Watch

    watch = Watch(target, stream)
    notifier = Notifier(target, config.resilience.notify)
    warned = False
    check_grace = _grace_check(config, target)

    def tick() -> None:
        nonlocal warned
        if gate.result and not warned:
            warned = True
            for warning in gate.result.get("warnings", ()):
                watch.say(f"warning: {warning}")
        watch.tick()
        notifier.tick()
        check_grace()

    def released() -> None:
        if ready_fd is not None:
            from launcher.detach import tell_ready

            tell_ready(ready_fd)

    try:
        place = open_place(config, plan, target, environment)
        watch.say(f"run {target.path}: {plan['world_size']} rank(s), checking data and tokenizer")
        supervisor = Supervisor(target, place.backend, place.resilience, lease, gate, tick, released=released)
        supervisor.membership, supervisor.exhausted = place.membership, place.exhausted
        supervisor.relieve = Relief(config, target, place.membership)
        if config.cluster.backend == "slurm":
            from launcher.backends.slurm import SlurmBackend
            from launcher.requeue import continue_job

            assert isinstance(place.backend, SlurmBackend)
            continue_job(supervisor, place.backend)
            if config.cluster.doctor:
                from launcher.first_step import examine_allocation

                examine_allocation(config, place.backend, target, watch.say)
        result = supervisor.supervise()
    finally:
        if not lease.lost.is_set():  # else another launch tells
            notifier.close()
        watch.close()
    if result.action.reason:
        watch.say(f"{result.verdict.outcome}: {result.action.reason}")
    return result


def _grace_check(config: LaunchConfig, target: RunDirectory) -> Callable[[], None]:
    """Looks now and then whether the grace time suffices, and leaves an event of it once (which the watch shows)."""
    next_look = time.monotonic() + _GRACE_SECONDS

    def check() -> None:
        nonlocal next_look
        if config.cluster.backend != "slurm" or time.monotonic() < next_look:
            return
        from launcher.grace import grace_problem

        with contextlib.suppress(OSError):  # storage away for a moment: the supervisor judges that
            problem = grace_problem(target, config.cluster)
            next_look = float("inf") if problem else time.monotonic() + _GRACE_SECONDS
            if problem:
                target.event_writer("launch").write("warning", message=problem)

    return check


@contextlib.contextmanager
def _writing(target: RunDirectory) -> Iterator[None]:
    """What cannot be written before a launch is the user's to change."""
    from trainer.failures import UserError

    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or target.path}: {error.strerror or error}; the run directory must be writable: "
            "change `output_dir`, or its permissions"
        ) from error


def _rank_environment(config: LaunchConfig, plan: dict[str, Any]) -> dict[str, str]:
    """Variables of every rank: the plan's, over them the user's own, over them the config's."""
    from trainer.agent import UMASK_VARIABLE
    from trainer.binding import BIND_VARIABLE
    from trainer.config.loading import REDACTED
    from trainer.failures import UserError

    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(plan["threads_per_rank"]))}
    if config.cluster.backend != "local" and "OMP_NUM_THREADS" not in os.environ:
        del variables["OMP_NUM_THREADS"]  # what there is, is known on the node: its agent divides it among the ranks
    if config.cluster.bind_cpus == "off":
        variables[BIND_VARIABLE] = "off"
    if config.cluster.umask is not None:
        variables[UMASK_VARIABLE] = config.cluster.umask
    if plan["device"] == "cpu":
        variables["DS_ACCELERATOR"] = "cpu"
    for name, value in config.cluster.environment.items():
        if value != REDACTED:
            variables[name] = value
        elif name not in os.environ:  # a resumed run: its records do not hold secrets
            raise UserError(f"cluster.environment.{name} is kept out of a run's records: export {name} and try again")
    return variables


def _tell_waiting(holder: Holder) -> None:
    print(
        f"waiting: the last launch (process {holder.pid} on {holder.node}) has left its lock behind; "
        "is it still alive? A few seconds will tell",
        file=sys.stderr,
        flush=True,
    )


def _write_html(target: RunDirectory) -> None:
    """The report for people; a run's end does not depend on it."""
    from launcher.html_report import write_report

    try:
        write_report(target)
    except Exception as error:
        print(f"warning: report.html could not be written: {error}", file=sys.stderr, flush=True)


def _print_account(target: RunDirectory, as_json: bool) -> None:
    from launcher.console import if_anybody_reads, print_json
    from launcher.report import report, show_report

    value = report(target)
    with if_anybody_reads(sys.stdout):
        if as_json:
            print_json(value)
        else:
            show_report(value)
