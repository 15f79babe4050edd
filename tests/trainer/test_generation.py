"""Generation: rows do not depend on one another, draws on the seed alone; metrics agree with their references."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from training_runs import launch, logs
from writing_runs import make_code_run, make_programs

from trainer.config.generation import CodeExecutionConfig, GenerationConfig, SummarizationTask
from trainer.config.tasks import CausalLMTask
from trainer.generation import Draw, Generator, Prompt
from trainer.inference import Replica
from trainer.text_metrics import final_answer, pass_at_k, text_scores

LLAMA = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Replica]:
    from transformers import LlamaConfig, LlamaForCausalLM

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, initializer_range=0.5, eos_token_id=7))
    model.config.use_cache = False  # as for training
    yield Replica(model.eval())
    dist.destroy_process_group()


def written(replica: Replica, prompts: list[np.ndarray], **settings: Any) -> list[list[list[int]]]:
    tokenizer = SimpleNamespace(eos_id=7, pad_id=None)
    generator = Generator(
        replica.model, GenerationConfig(max_new_tokens=12, **settings), cast("Any", tokenizer), torch.device("cpu")
    )
    return generator(cast("Any", replica), [Prompt(p, (0, i, 0)) for i, p in enumerate(prompts)])


def test_greedy_and_beam_texts_are_those_of_each_prompt_alone(replica: Replica) -> None:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(8, 61, n).astype(np.int32) for n in (3, 11, 1, 6, 9)]
    for settings in ({}, {"num_beams": 3}):
        together = written(replica, prompts, batch_size=4, **settings)
        for prompt, (row,) in zip(prompts, together, strict=True):
            output = replica.model.generate(
                input_ids=torch.from_numpy(prompt)[None].long(),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=12,
                do_sample=False,
                use_cache=True,
                pad_token_id=7,
                **settings,
            )
            tail = output[0, len(prompt) :].tolist()
            assert row == tail[: tail.index(7)] if 7 in tail else row == tail
    assert len({tuple(row) for (row,) in together}) > 1


def test_a_text_ends_where_the_positions_of_a_model_do() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    small = Replica(GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.5, eos_token_id=7)).eval())
    prompts = [np.arange(8, 8 + n, dtype=np.int32) for n in (5, 28, 32)]
    together = written(small, prompts)
    assert [len(texts[0]) for texts in together[1:]] == [5, 1]  # the last token of a text is never read
    assert together[:1] == written(small, prompts[:1])


def test_draws_depend_on_seed_and_prompt_alone(replica: Replica) -> None:
    prompts = [np.arange(8, 8 + n, dtype=np.int32) for n in (2, 5, 9)]
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "samples_per_prompt": 3}
    one, many = (written(replica, prompts, batch_size=size, **options) for size in (1, 16))
    assert one == many
    assert len({tuple(row) for row in one[0]}) > 1
    assert written(replica, prompts, **options, seed=1) != one


def test_draws_follow_the_distribution() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draw = Draw(GenerationConfig(do_sample=True), [(n,) for n in range(4000)])
    chosen = draw(torch.zeros(4000, 1, dtype=torch.int64), shares.log().expand(4000, -1)).argmax(-1)
    assert torch.bincount(chosen, minlength=4) / 4000 == pytest.approx(shares, abs=0.03)
    narrow = Draw(GenerationConfig(do_sample=True, top_p=0.7), [(n,) for n in range(500)])
    chosen = narrow(torch.zeros(500, 1, dtype=torch.int64), shares.log().expand(500, -1)).argmax(-1)
    assert set(chosen.tolist()) == {0, 1}


def test_pass_at_k_is_the_estimator_of_the_paper() -> None:
    for n in (1, 5, 20):
        for c in range(n + 1):
            for k in range(1, n + 1):
                wanted = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
                assert pass_at_k(n, c, k) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(3, 1, 4)


def test_metrics_are_those_of_the_libraries() -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    texts = ["the cat sat on the mat today", "a dog barks at night", "#### 1,200."]
    references = [["the cat sat on a mat", "a cat sat on the mat today"], ["a dog barked at night"], ["so #### 1200"]]
    task = SummarizationTask(type="summarization")
    names = ("bleu", "chrf", "ter", "rouge1", "rougeL", "rougeLsum", "exact_match", "final_answer")
    scores, signatures = text_scores(names, texts, references, task)
    streams = [[r[0] for r in references], [r[1] if len(r) > 1 else None for r in references]]
    assert scores["bleu"] == sacrebleu.corpus_bleu(texts, streams).score  # type: ignore[arg-type]
    assert scores["chrf"] == sacrebleu.corpus_chrf(texts, streams).score  # type: ignore[arg-type]
    assert scores["ter"] == sacrebleu.corpus_ter(texts, streams).score  # type: ignore[arg-type]
    scorer = RougeScorer(["rouge1", "rougeL", "rougeLsum"])
    for name in ("rouge1", "rougeL", "rougeLsum"):
        found = [scorer.score_multi(r, t)[name].fmeasure for t, r in zip(texts, references, strict=True)]
        assert scores[name] == pytest.approx(np.mean(found), abs=1e-12)
    assert (scores["exact_match"], scores["final_answer"]) == (0.0, pytest.approx(1 / 3))
    assert set(signatures) == {"bleu", "chrf", "ter"}
    assert final_answer(r"####\s*(\S+)", "#### 3 then #### $1,042.") == "1042"
    assert final_answer(r"####\s*(\S+)", "#### .5") == ".5"


def test_scores_are_those_that_the_reference_commands_show(tmp_path: Path) -> None:
    """sacrebleu's to the last of its digits; rouge-score's of each text, of which ours are the means."""
    draw, words = random.Random(3), ["Ein", "Hund", "läuft", "über", "die", "Straße", ",", "3,5", "the", "dogs", "ran."]
    references = [" ".join(draw.choices(words, k=draw.randint(4, 20))) for _ in range(120)]
    texts = [" ".join(word for word in line.split() if draw.random() > 0.2) or "nichts" for line in references]
    for name, lines in (("texts", texts), ("references", references)):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    rouge = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    task = SummarizationTask(type="summarization", rouge_stemmer=True)
    scores, _ = text_scores(("bleu", "chrf", "ter", *rouge), texts, [[line] for line in references], task)

    digits = 10
    command = ["sacrebleu", "references", "-i", "texts", "-m", "bleu", "chrf", "ter", "-w", str(digits), "-b"]
    assert json.loads(shown_by(command, tmp_path)) == [round(scores[name], digits) for name in ("bleu", "chrf", "ter")]
    command = ["rouge_score.rouge", "--target_filepattern=references", "--prediction_filepattern=texts"]
    command += ["--output_filename=scores.csv", f"--rouge_types={','.join(rouge)}", "--use_stemmer", "--noaggregate"]
    shown_by(command, tmp_path)
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 120
    for name in rouge:
        assert scores[name] == pytest.approx(np.mean([float(row[f"{name}-F"]) for row in rows]), abs=1e-6)


def shown_by(command: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_that_contradict_are_refused() -> None:
    for settings in (
        {"temperature": 0.5},
        {"do_sample": True, "num_beams": 2},
        {"samples_per_prompt": 2},
        {"beams": 1},
    ):
        with pytest.raises(ValidationError):
            GenerationConfig.model_validate(settings)
    with pytest.raises(ValidationError, match="pass@5"):
        CausalLMTask(
            type="causal-lm",
            generation=GenerationConfig(),
            code_execution=CodeExecutionConfig(enabled=True, pass_at=(1, 5)),
        )
    with pytest.raises(ValidationError, match="give `generation`"):
        CausalLMTask.model_validate({"type": "causal-lm", "metrics": ["exact_match"]})


def test_a_model_learns_to_write_programs_that_pass(tmp_path: Path) -> None:
    """Two ranks; five problems in HumanEval's layout, two micro-batches on one rank and one on the other."""
    run = make_code_run(tmp_path / "code", make_programs(tmp_path), 2, {"max_new_tokens": 24, "stop": ["\ndef"]})
    assert launch(run, 2) == 0, logs(run)
    (line,) = run.evaluation_lines()
    scores = line["evaluation"]
    shown = [json.loads(text) for text in (run.path / "samples.jsonl").read_text().splitlines()]
    assert scores["generated"] == len(shown) == 5
    assert scores["pass@1"] == sum(s["passed"][0] for s in shown) / 5 >= 0.4
    assert scores["exact_match"] >= 0.4
