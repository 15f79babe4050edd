"""Each task trained on public data: `python benchmarks/generative_scores.py --data DIR --task mbpp` (or `--task all`).

A small model from random weights is trained by `dsft launch`, in fp32, at each number of ranks. Reported are the scores
of the untrained model, of trivial baselines and of the trained one, and how far losses, scores and written texts at
other numbers of ranks differ from those at the first. Fails where a recipe does not beat its baselines or its ranks do
not agree. Results of several calls gather in one table.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import generative_recipes
import generative_recipes_images
import numpy as np
from common import RESULTS, launch, machine, write_result
from generative_recipes import Recipe

FIRST_STEPS, LIMIT = 10, 1e-5  # losses of the first steps agree to this, relatively; later ones to rounding that grows
UNIGRAMS = 0.3  # share of the unigrams in the mixture with bigrams
RECIPES = {
    "multi30k": generative_recipes.multi30k,
    "multi30k-decoder": generative_recipes.multi30k_decoder,
    "e2e": generative_recipes.e2e,
    "gsm8k": generative_recipes.gsm8k,
    "tinyshakespeare": generative_recipes.shakespeare,
    "mbpp": generative_recipes.mbpp,
    "mbpp-learned": generative_recipes.mbpp_learned,
    "humaneval-learned": generative_recipes.humaneval_learned,
    "nlvr-colours": generative_recipes_images.nlvr_colours,
    "nlvr-questions": generative_recipes_images.nlvr_questions,
    "nlvr-statements": generative_recipes_images.nlvr_statements,
}
SHOWN = ("loss", "bleu", "chrf", "rougeL", "final_answer", "pass@1", "accuracy", "exact_match")


def make_config(recipe: Recipe, folder: Path, name: str, ranks: int, steps: int) -> dict[str, Any]:
    """The config of one run; ``steps`` 0: of the untrained model, by one step at a learning rate of nothing."""
    task = json.loads(json.dumps(recipe.task))
    if task.get("generation"):
        task["generation"]["shown"] = 20
    return {
        "name": name,
        "output_dir": str(folder / "runs"),
        "task": task,
        "model": {**recipe.model, "dtype": "float32", "gradient_checkpointing": False},
        "data": {
            "train": [{"path": str(recipe.train), **recipe.source}],
            "evaluation": recipe.evaluation,
            "sequence_length": recipe.sequence_length,
            "on_long": "truncate",
        },
        "training": {
            "global_batch_size": recipe.batch,
            "micro_batch_size": recipe.batch // 2,
            "max_steps": max(steps, 1),
            "optimizer": {"learning_rate": recipe.learning_rate if steps else 1e-30, "betas": [0.9, 0.98]},
            "schedule": {"type": "linear", "warmup_steps": steps // 10},
        },
        "checkpoint": {"interval_steps": None},
        "evaluation": {"interval_steps": max(steps // 2, 1)},
        "export": {"enabled": False},
        "logging": {"tensorboard": False},
        "cluster": {"backend": "local", "processes_per_node": ranks, "environment": {"DS_ACCELERATOR": "cpu"}},
    }


def run(recipe: Recipe, folder: Path, name: str, ranks: int, steps: int) -> dict[str, Any]:
    """Losses of a run's steps, the scores of its evaluations, and its seconds."""
    directory = launch(make_config(recipe, folder, name, ranks, steps), folder)
    made = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    samples = directory / "samples.jsonl"
    return {
        "losses": [line["loss"] for line in made if "loss" in line],
        "evaluations": {line["step"]: line["evaluation"] for line in made if "evaluation" in line},
        "seconds": made[-1]["time"] - made[0]["time"],
        "samples": samples.read_text().splitlines()[-20:] if samples.exists() else [],
    }


def counted_losses(recipe: Recipe, folder: Path) -> dict[str, dict[str, float]]:
    """Mean loss over the held-out targets of what counts of training targets predict.

    Unigrams with one added to each count; bigrams mixed with them by the share UNIGRAMS.
    """
    from trainer.config.schema import LaunchConfig
    from trainer.data.sample import Sample
    from trainer.tasks import get_task, task_tokenizer

    config = LaunchConfig.model_validate(make_config(recipe, folder, "counts", 1, 1))
    task = get_task(config, task_tokenizer(config))

    def targets(path: str) -> list[tuple[int, int]]:
        records = [json.loads(line) for line in Path(path).read_text().splitlines()]
        names = task.columns({}, records[0])
        made = task.encode([{name: record[column] for name, column in names.items()} for record in records])
        found: list[tuple[int, int]] = []
        for sample in made:
            assert isinstance(sample, Sample)
            places = np.flatnonzero(sample.targets[: recipe.sequence_length])
            found += [(int(sample.tokens[place - 1]), int(sample.tokens[place])) for place in places]
        return found

    learned, held_out = targets(str(recipe.train)), targets(recipe.evaluation[0]["path"])
    ones, pairs = Counter(token for _, token in learned), Counter(learned)
    before = Counter(token for token, _ in learned)
    total = len(learned) + recipe.model["config"]["vocab_size"]
    unigram = {token: (ones[token] + 1) / total for _, token in held_out}
    losses = {"unigrams": 0.0, "bigrams": 0.0}
    for pair in held_out:
        one = unigram[pair[1]]
        two = UNIGRAMS * one + (1 - UNIGRAMS) * (pairs[pair] / before[pair[0]] if before[pair[0]] else one)
        losses["unigrams"] -= math.log(one) / len(held_out)
        losses["bigrams"] -= math.log(two) / len(held_out)
    return {name: {"loss": loss} for name, loss in losses.items()}


def measure(name: str, data: Path, ranks: list[int], steps: int | None) -> dict[str, Any]:
    """Everything about one recipe."""
    with tempfile.TemporaryDirectory(prefix="dsft-scores-") as scratch:
        folder = Path(scratch)
        recipe = RECIPES[name](data, folder)
        wanted = steps or recipe.steps
        baselines = dict(recipe.baselines)
        if recipe.counted:
            baselines |= counted_losses(recipe, folder)
        untrained = run(recipe, folder, "untrained", ranks[0], 0)
        runs = {count: run(recipe, folder, f"ranks{count}", count, wanted) for count in ranks}
    first = runs[ranks[0]]
    differences = [
        max(abs(a - b) / abs(b) for a, b in zip(other["losses"][:FIRST_STEPS], first["losses"], strict=False))
        for other in runs.values()
    ]
    last = {count: list(made["evaluations"].values())[-1] for count, made in runs.items()}
    samples = [made.pop("samples") for made in runs.values()]  # texts of the data: compared, and not kept
    sign = -1 if recipe.judged == "loss" else 1
    beaten = {
        rival: sign * (last[ranks[0]][recipe.judged] - scores[recipe.judged]) > 0
        for rival, scores in baselines.items()
        if recipe.judged in scores and rival != "bigrams"  # no trivial rival: it is shown for comparison
    }
    return {
        "task": recipe.task["type"],
        "about": (RECIPES[name].__doc__ or "").strip(),
        "steps": wanted,
        "batch": recipe.batch,
        "learning_rate": recipe.learning_rate,
        "model": recipe.model["config"],
        "judged": recipe.judged,
        "untrained": list(untrained["evaluations"].values())[-1],
        "baselines": baselines,
        "beaten": beaten,
        "expected": recipe.beats,
        "runs": {str(count): made for count, made in runs.items()},
        "first_steps_differ": max(differences),
        "samples_differ": sum(line != its for other in samples for line, its in zip(samples[0], other, strict=True)),
        "scores_differ": {
            score: max(abs(scores[score] - value) for scores in last.values())
            for score, value in last[ranks[0]].items()
        },
        "machine": machine(),
    }


def table(tasks: dict[str, Any]) -> list[list[str]]:
    """A row for each model and baseline of each task."""
    rows = [["data", "", *SHOWN]]
    for name, told in tasks.items():

        def row(who: str, scores: dict[str, float], name: str = name) -> list[str]:
            values = [scores.get(score, scores.get(f"held_out/{score}")) for score in SHOWN]
            return [name, who, *("" if value is None else f"{value:.4g}" for value in values)]

        rows += [row(rival, scores) for rival, scores in told["baselines"].items()]
        rows.append(row("untrained", told["untrained"]))
        for count, made in told["runs"].items():
            steps, scores = list(made["evaluations"].items())[-1]
            rows.append(row(f"{steps} steps, ranks: {count}", scores))
    return rows


def write_results(folder: Path, tasks: dict[str, Any]) -> None:
    """generative_scores.json and .md with these tasks and those of earlier calls."""
    path = folder / "generative_scores.json"
    earlier = json.loads(path.read_text())["tasks"] if path.exists() else {}
    told = {name: {**earlier, **tasks}[name] for name in RECIPES if name in {**earlier, **tasks}}
    value = {
        "command": "python benchmarks/generative_scores.py --data DATA --task NAME",
        "formula": "scores of held-out data by dsft's evaluation; loss: mean over target tokens, nats",
        "tasks": told,
    }
    write_result(folder, "generative_scores", value, table(told))
    lines = [
        "| data | date | losses of the first 10 steps differ by | last scores differ by | samples that differ |",
        "|---|---|---|---|---|",
    ]
    for name, one in told.items():
        differ = ", ".join(f"{score} {value:.2g}" for score, value in one["scores_differ"].items() if score in SHOWN)
        differ += f" | {one['samples_differ']}"
        lines.append(f"| {name} | {one['machine']['date']} | {one['first_steps_differ']:.1e} | {differ} |")
    with (folder / "generative_scores.md").open("a") as page:
        print("", *lines, sep="\n", file=page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--task", nargs="+", default=["all"], choices=["all", *RECIPES])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = list(RECIPES) if "all" in options.task else options.task
    failed = []
    for name in names:
        told = measure(name, options.data.absolute(), options.ranks, options.steps)
        write_results(options.output, {name: told})
        if told["expected"] and not all(told["beaten"].values()):
            failed.append(f"{name} does not beat {[rival for rival, won in told['beaten'].items() if not won]}")
        if told["first_steps_differ"] > LIMIT:
            failed.append(f"{name}: losses of the first steps differ by {told['first_steps_differ']:.1e}")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
