"""`dsft checkpoint list|verify|diff|gc|save RUN`: a run's checkpoints, without torch; `import` for DeepSpeed's own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launcher.console import gib, print_json
from trainer.checkpoint_files import (
    Checkpoint,
    damage,
    differences,
    list_checkpoints,
    published,
    remove,
    retention_of,
    superfluous,
)
from trainer.failures import EXIT_DONE, EXIT_FAILED, UserError
from trainer.rundir import RunDirectory, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    helps = {
        "list": "what there is: step, size, scores",
        "verify": "check every file of every published checkpoint against its checksum",
        "diff": "what differs between two checkpoints",
        "gc": "remove what the config's retention does not keep, and what was set aside",
        "save": "ask a running run for a checkpoint after its next step",
    }
    for action, text in helps.items():
        subparser = actions.add_parser(action, help=text, description=text[0].upper() + text[1:] + ".")
        subparser.add_argument("run", metavar="RUN", help="run directory or name")
        if action == "verify":
            subparser.add_argument("--step", type=int, metavar="N", help="only this one")
        if action == "diff":
            subparser.add_argument("a", type=int, metavar="A", help="a step")
            subparser.add_argument("b", type=int, metavar="B", help="another step")
        if action == "gc":
            subparser.add_argument("--dry-run", action="store_true", help="show what would be removed; remove nothing")
        subparser.add_argument("--json", action="store_true", help="print JSON")
    text = "make a Hugging Face folder of a checkpoint that plain DeepSpeed has written, for `model.path`"
    subparser = actions.add_parser("import", help=text, description=text[0].upper() + text[1:] + ".")
    subparser.add_argument("checkpoint", metavar="FOLDER", type=Path, help="as given to save_checkpoint, or universal")
    subparser.add_argument("--model", required=True, help="Hugging Face folder or hub id: its config and tokenizer")
    subparser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new folder")
    subparser.add_argument("--tag", help="which checkpoint in FOLDER; default: the one in `latest`")
    subparser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    subparser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Do it; `verify` ends with 1 where something is damaged, `diff` where something differs."""
    from launcher.registry import find_run

    if options.action == "import":
        return _import(options)
    found = find_run(options.run)
    actions = {"list": _list, "verify": _verify, "diff": _diff, "gc": _gc, "save": _save}
    return actions[options.action](found, options)


def _show(options: argparse.Namespace, values: list[dict[str, Any]], lines: list[str], none: str) -> None:
    print_json(values) if options.json else print("\n".join(lines) or none)


def _to_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "step": checkpoint.step,
        "status": checkpoint.status,
        "bytes": checkpoint.size,
        "world_size": checkpoint.world_size,
        "evaluation": dict(checkpoint.scores) or None,
        "path": str(checkpoint.folder),
    }


def _list(target: RunDirectory, options: argparse.Namespace) -> int:
    found = list_checkpoints(target)
    lines = []
    for checkpoint in found:
        loss = "".join(f"  {name} {value:.6g}" for name, value in checkpoint.scores.items() if isinstance(value, float))
        ranks = "" if checkpoint.world_size is None else f"  {checkpoint.world_size} ranks"
        lines.append(f"{checkpoint.folder.name}  {checkpoint.status}  {gib(checkpoint.size)}{ranks}{loss}")
    _show(options, [_to_json(checkpoint) for checkpoint in found], lines, "no checkpoints yet")
    return EXIT_DONE


def _verify(target: RunDirectory, options: argparse.Namespace) -> int:
    if options.step is not None:
        published(target, options.step)  # says what there is
    results = []
    for one in list_checkpoints(target):
        if one.status == "published" and options.step in (None, one.step):
            problem = damage(one.folder)
            if problem is None or (one.folder / "manifest.json").exists():  # else the run has removed it meanwhile
                results.append({"step": one.step, "damage": problem})
    lines = [f"step {result['step']}: {result['damage'] or 'whole'}" for result in results]
    _show(options, results, lines, "no checkpoints yet")
    return EXIT_FAILED if any(result["damage"] for result in results) else EXIT_DONE


def _diff(target: RunDirectory, options: argparse.Namespace) -> int:
    found = list(differences(published(target, options.a), published(target, options.b)))
    values = [{"what": what, "a": old, "b": new} for what, old, new in found]
    _show(options, values, [f"{what}: {_short(old)} -> {_short(new)}" for what, old, new in found], "no difference")
    return EXIT_FAILED if found else EXIT_DONE


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _gc(target: RunDirectory, options: argparse.Namespace) -> int:
    from trainer.config.schema import LaunchConfig
    from trainer.lease import acquire

    config = LaunchConfig.model_validate_json(target.config_path.read_text())
    _refuse_while_running(target)
    with acquire(target.lock_dir, lambda _: None):  # nobody trains in it meanwhile
        found = list_checkpoints(target)
        doomed = [c for c in found if c.status != "published"] + superfluous(found, retention_of(config))
        steps = target.published_checkpoints()
        if steps and not options.dry_run and (problem := damage(published(target))):
            raise UserError(
                f"the newest checkpoint is damaged: {problem}; nothing is removed. `dsft resume` sets it aside"
            )
        if not options.dry_run:
            for checkpoint in doomed:
                remove(checkpoint.folder)
    word = "would remove" if options.dry_run else "removed"
    lines = [f"{word} {c.folder.name}  {c.status}  {gib(c.size)}" for c in doomed]
    _show(options, [_to_json(c) for c in doomed], lines, "nothing to remove")
    return EXIT_DONE


def _refuse_while_running(target: RunDirectory) -> None:
    from launcher.state import run_state

    if run_state(target).state == "running":
        raise UserError(f"{target.path} is running, and thins out its checkpoints itself; `dsft cancel` stops it")


def _save(target: RunDirectory, options: argparse.Namespace) -> int:
    from launcher.state import current_attempt, run_state

    if run_state(target).state != "running":
        raise UserError(f"{target.path} is not running: nothing can be saved")
    attempt = current_attempt(target)
    write_json(target.save_request_path(attempt), {})
    _show(options, [{"attempt": attempt}], ["asked for: `dsft checkpoint list` shows it when it is written"], "")
    return EXIT_DONE


def _import(options: argparse.Namespace) -> int:
    from launcher.options import run_module

    words = [str(options.checkpoint), options.model, str(options.output.absolute()), options.dtype]
    code, report = run_module("trainer.deepspeed_import", *words, *([options.tag] if options.tag else []))
    if code == EXIT_DONE:
        line = f'{report["parameters"]} parameters in {report["path"]}; use it: "model": {{"path": "{report["path"]}"}}'
        print(json.dumps(report) if options.json else line)
    return code
