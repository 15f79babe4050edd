"""Translation by a small encoder-decoder model, trained for real: scores, samples, ranks, export, long texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import launch, logs
from writing_runs import make_run, make_texts, pair

from trainer.config.schema import LaunchConfig
from trainer.data.sample import PackedSequence, Sample
from trainer.failures import DataError, UserError
from trainer.rundir import RunDirectory
from trainer.tasks import get_task
from trainer.tokenizer import load_tokenizer

GENERATION = {"max_new_tokens": 20, "batch_size": 2, "shown": 100}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> RunDirectory:
    run = make_run(tmp_path_factory.mktemp("runs") / "two", texts, 2, GENERATION)
    assert launch(run, 2) == 0, logs(run)
    return run


def samples(run: RunDirectory, step: int = 48) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] == step]


def test_it_learns_to_translate(finished: RunDirectory) -> None:
    first, last = [line["evaluation"] for line in finished.evaluation_lines()]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["chrf"] > first["chrf"] + 10
    shown = samples(finished)
    expected = [pair(n) for n in range(240)][::23]
    assert [(s["source"], s["references"]) for s in shown] == [(a, [b]) for a, b in expected]
    assert shown[0]["signatures"]["bleu"].startswith("nrefs:1|case:mixed")


def test_scores_are_those_of_sacrebleu(finished: RunDirectory) -> None:
    import sacrebleu

    shown = samples(finished)
    written, references = [s["texts"][0] for s in shown], [[s["references"][0] for s in shown]]
    last = finished.evaluation_lines()[-1]["evaluation"]
    assert last["bleu"] == sacrebleu.corpus_bleu(written, references).score
    assert last["chrf"] == sacrebleu.corpus_chrf(written, references).score
    assert last["exact_match"] == sum(a == b for a, b in zip(written, references[0], strict=True)) / len(written)


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.matrix)])
def test_other_numbers_of_ranks_learn_and_write_the_same(
    finished: RunDirectory, texts: Path, tmp_path: Path, ranks: int
) -> None:
    run = make_run(tmp_path / "other", texts, ranks, GENERATION)
    assert launch(run, ranks) == 0, logs(run)
    for line, other in zip(run.step_lines(), finished.step_lines(), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert line["target_tokens"] == other["target_tokens"]
    assert samples(run, 24) == samples(finished, 24)
    assert samples(run) == samples(finished)


def test_the_export_writes_the_same_in_plain_transformers(finished: RunDirectory) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(finished.export_dir)
    tokenizer = AutoTokenizer.from_pretrained(finished.export_dir)
    for sample in samples(finished):
        given = tokenizer(sample["source"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=given, max_new_tokens=20)
        assert tokenizer.decode(output[0], skip_special_tokens=True).strip() == sample["texts"][0]


def config_of(texts: Path, tmp_path: Path, **more: Any) -> LaunchConfig:
    run = make_run(tmp_path / "run", texts, 1, GENERATION, **more)
    return LaunchConfig.model_validate_json(run.config_path.read_text())


def test_sources_and_targets_end_and_are_cut(texts: Path, tmp_path: Path) -> None:
    config = config_of(texts, tmp_path, data__sequence_length=12)
    tokenizer = load_tokenizer(config.model)
    task = get_task(config, tokenizer)
    records = [{"source": "one", "target": ["unum", "una"]}, {"source": "two " * 20, "target": "duo " * 20}]
    short, long = task.encode([*records, {"source": "a", "target": 3}])[:2]
    assert not isinstance(short, str | list)
    assert not isinstance(long, str | list)
    one, unum = tokenizer.encode_batch(["one", "unum"])
    assert short.tokens.tolist() == [*one, 1, *unum, 1]
    assert short.tokens[short.targets].tolist() == [*unum, 1]
    assert short.reference == {"source": "one", "references": ["unum", "una"]}
    assert not short.truncated
    assert long.truncated
    assert (len(long.tokens), int(long.targets.sum())) == (12, 6)
    assert long.tokens[5] == long.tokens[11] == 1  # both still end
    assert "expected a text" in str(task.encode([{"source": "a", "target": 3}])[0])


def test_summaries_may_be_called_so(texts: Path, tmp_path: Path) -> None:
    config = config_of(texts, tmp_path, task={"type": "summarization"})
    task = get_task(config, load_tokenizer(config.model))
    record = {"text": "one", "summary": "unum"}
    assert task.columns({}, record) == {"source": "text", "target": "summary"}
    assert task.columns({"text": "article"}, {"article": "one", "summary": "unum"})["source"] == "article"
    (named,), (made,) = task.encode([{"source": "one", "target": "unum"}]), task.encode([record])  # of a template
    assert isinstance(named, Sample)
    assert isinstance(made, Sample)
    assert made.tokens.tolist() == named.tokens.tolist()
    with pytest.raises(DataError, match="no column 'target'"):
        task.columns({}, {"text": "one"})


@pytest.mark.parametrize("family", ["bart", "mbart", "m2m_100", "encoder-decoder"])
def test_the_loss_is_the_familys_own(texts: Path, tmp_path: Path, family: str) -> None:
    """M2M100 moves its labels in the forward pass alone, BART by a method as well; of two BERTs one becomes decoder."""
    import torch
    import transformers

    config = config_of(texts, tmp_path)
    task = get_task(config, load_tokenizer(config.model))
    values = {**(config.model.config or {}), "model_type": family}
    if family == "encoder-decoder":
        bert = {"model_type": "bert", "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1}
        bert["num_attention_heads"] = 2
        values = {"model_type": family, "decoder_start_token_id": 2, "encoder": bert, "decoder": {**bert}}
    model_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    task.configure(model_config)
    model = transformers.AutoModelForSeq2SeqLM.from_config(model_config).eval()
    sample = task.encode([{"source": "one", "target": "unum"}])[0]
    assert isinstance(sample, Sample)
    objective = task.objective(model, "sdpa", torch.device("cpu"))
    loss, _ = objective(model, [PackedSequence((sample,))])
    assert float(objective(model, [])[0].detach()) == 0.0  # of a rank without texts
    source, target = (torch.from_numpy(sample.tokens[chosen])[None] for chosen in (~sample.targets, sample.targets))
    plain = model(input_ids=source, labels=target.long()).loss * target.numel()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert family != "encoder-decoder" or model_config.decoder.is_decoder


def test_a_decoder_is_refused_with_what_to_do(texts: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = config_of(texts, tmp_path)
    with pytest.raises(UserError, match="causal-lm"):
        get_task(config, load_tokenizer(config.model)).configure(LlamaConfig())


@pytest.mark.parametrize(
    ("name", "setting"), [("MBartTokenizer", "decoder_start_token_id"), ("MBart50Tokenizer", "forced_bos_token_id")]
)
def test_language_codes_stand_where_the_family_has_them(texts: Path, tmp_path: Path, name: str, setting: str) -> None:
    import sentencepiece
    import transformers

    model = sentencepiece.SentencePieceProcessor(model_file=str(texts / "pieces.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    vocabulary = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")] + pieces
    family = getattr(transformers, name)(vocab=vocabulary, src_lang="en_XX", tgt_lang="de_DE")
    family.save_pretrained(tmp_path / "tokenizer")
    codes = {"type": "translation", "source_language": "en_XX", "target_language": "de_DE"}
    config = config_of(texts, tmp_path, model__tokenizer=str(tmp_path / "tokenizer"), task=codes)
    task = get_task(config, load_tokenizer(config.model))
    sample = task.encode([{"source": "one", "target": "unum"}])[0]
    assert not isinstance(sample, str | list)
    code = family.convert_tokens_to_ids("de_DE")
    learned = sample.tokens[sample.targets].tolist()
    assert learned[0 if setting.startswith("forced") else -1] == code
    assert family.convert_tokens_to_ids("en_XX") in sample.tokens[~sample.targets]
    generation = transformers.GenerationConfig()
    task.configure_generation(generation)
    assert getattr(generation, setting) == code
