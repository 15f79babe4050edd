"""Families of models that write text: the same texts at any number of ranks, by `dsft predict` and by the export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from image_data import predictions_of
from training_runs import launch, logs
from writing_runs import make_run, make_texts

from trainer.rundir import RunDirectory

pytestmark = pytest.mark.matrix

SIZES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_model": 48}
SIZES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART_LIKE = {**SIZES, "dropout": 0.0, "max_position_embeddings": 64, "init_std": 0.1, "forced_eos_token_id": None}
GREEDY = {"max_new_tokens": 20, "batch_size": 2, "shown": 100}
BEAMS = {**GREEDY, "num_beams": 3, "length_penalty": 0.5}
TEMPLATE = {"prompt": "{source}", "completion": "{target}"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("texts"))


def t5(texts: Path, folder: Path) -> dict[str, Any]:
    config = {"model_type": "t5", "vocab_size": 48, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 1}
    config |= {"num_decoder_layers": 1, "num_heads": 4, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1}
    return {"model__config": {**config, "decoder_start_token_id": 0}, "task__generation": BEAMS}


def mbart(texts: Path, folder: Path) -> dict[str, Any]:
    """With its tokenizer: language codes end the sources, and begin what is written."""
    import sentencepiece
    import transformers

    model = sentencepiece.SentencePieceProcessor(model_file=str(texts / "pieces.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(3, model.get_piece_size())]
    vocabulary = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")] + pieces
    family = transformers.MBartTokenizer(vocab=vocabulary, src_lang="en_XX", tgt_lang="de_DE")
    family.save_pretrained(folder / "tokenizer")
    config = {"model_type": "mbart", "vocab_size": len(family), **BART_LIKE, "pad_token_id": 1, "eos_token_id": 2}
    codes = {"source_language": "en_XX", "target_language": "de_DE"}
    task = {"type": "translation", "generation": GREEDY, "metrics": ["bleu", "chrf", "exact_match"], **codes}
    return {"model__config": config, "model__tokenizer": str(folder / "tokenizer"), "task": task}


def marian(texts: Path, folder: Path) -> dict[str, Any]:
    """With its tokenizer: a vocabulary of its own over a SentencePiece model for each side."""
    import sentencepiece
    import transformers

    model = sentencepiece.SentencePieceProcessor(model_file=str(texts / "pieces.model"))
    pieces = ["</s>", "<unk>", *(model.id_to_piece(i) for i in range(3, model.get_piece_size())), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    for side in ("source", "target"):
        shutil.copy(texts / "pieces.model", folder / f"{side}.spm")
    family = transformers.MarianTokenizer(str(folder / "source.spm"), str(folder / "target.spm"), folder / "vocab.json")
    family.save_pretrained(folder / "tokenizer")
    pad = len(pieces) - 1
    ids = {"pad_token_id": pad, "eos_token_id": 0, "bos_token_id": 0, "decoder_start_token_id": pad}
    config = {"model_type": "marian", "vocab_size": len(pieces), **BART_LIKE, **ids}
    return {"model__config": config, "model__tokenizer": str(folder / "tokenizer")}


def llama(texts: Path, folder: Path) -> dict[str, Any]:
    """A decoder by itself, which translates after a template."""
    config = {"model_type": "llama", "vocab_size": 48, "hidden_size": 48, "intermediate_size": 96, "eos_token_id": 1}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    data = [{"path": str(texts / f"{name}.jsonl"), "template": TEMPLATE} for name in ("train", "test")]
    task = {"type": "causal-lm", "generation": GREEDY, "metrics": ["bleu", "chrf", "exact_match"]}
    return {"model__config": config, "task": task, "data__train": data[:1], "data__evaluation": data[1:]}


FAMILIES = {"t5": t5, "mbart": mbart, "marian": marian, "llama": llama}


def trained(folder: Path, texts: Path, ranks: int, **more: Any) -> RunDirectory:
    run = make_run(folder, texts, ranks, GREEDY, **more)
    assert launch(run, ranks) == 0, logs(run)
    return run


def samples(run: RunDirectory, step: int = 48) -> list[dict[str, Any]]:
    """What an evaluation wrote; at step 24 the weights of two runs differ by less than 1e-6, at 48 maybe by more."""
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] == step]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_writes_the_same_everywhere(family: str, texts: Path, tmp_path: Path) -> None:
    import transformers

    more = FAMILIES[family](texts, tmp_path)
    one, two, three = (trained(tmp_path / f"ranks{ranks}", texts, ranks, **more) for ranks in (1, 2, 3))
    assert samples(one, 24) == samples(two, 24) == samples(three, 24)
    assert len({sample["texts"][0] for sample in samples(two, 24)}) > 1
    first, last = [line["evaluation"] for line in two.evaluation_lines()]
    assert first == pytest.approx(one.evaluation_lines()[0]["evaluation"], rel=1e-5)
    assert last["loss"] < 0.95 * first["loss"]
    assert last["loss"] == pytest.approx(one.evaluation_lines()[-1]["evaluation"]["loss"], rel=2e-2)

    decoder = family == "llama"
    assert decoder == ("model.fused_loss: head and loss work as one" in logs(two))
    auto = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(two.export_dir, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(two.export_dir)
    options = {"num_beams": 3, "length_penalty": 0.5} if family == "t5" else {}
    for sample in samples(two):
        source = sample["source"] + tokenizer.eos_token if family == "t5" else sample["source"]
        given = tokenizer(source, return_tensors="pt", add_special_tokens=not decoder)["input_ids"]
        with torch.no_grad():
            output = model.generate(input_ids=given, max_new_tokens=20, do_sample=False, **options)[0]
        output = output[given.shape[1] :] if decoder else output
        written = tokenizer.decode(output, skip_special_tokens=True)
        assert written.strip() == sample["texts"][0].strip()
    answers = predictions_of(two.path, texts / "test.jsonl", tmp_path / "answers.jsonl", processes=2)
    assert [answer["text"] for answer in answers] == [sample["texts"][0] for sample in samples(two)]


def test_drawn_texts_are_the_same_at_any_number_of_ranks(texts: Path, tmp_path: Path) -> None:
    drawn = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95, "samples_per_prompt": 3}
    more = llama(texts, tmp_path)
    more["task"]["generation"] = drawn
    runs = [trained(tmp_path / f"ranks{ranks}", texts, ranks, **more) for ranks in (1, 2, 3)]
    written = [[sample["texts"] for sample in samples(run, 24)] for run in runs]
    assert written[0] == written[1] == written[2]
    assert any(len(set(of)) > 1 for of in written[0])


def test_an_adapter_of_an_encoder_decoder_model(texts: Path, tmp_path: Path) -> None:
    """LoRA on a T5 that has been trained: only the adapter changes, and the merged export writes what was scored."""
    import transformers
    from safetensors.torch import load_file

    base = trained(tmp_path / "base", texts, 1, **t5(texts, tmp_path), training__max_steps=24)
    model = {"path": str(base.export_dir), "dtype": "float32", "adapter": {"rank": 4, "targets": ["q", "v", "wo"]}}
    options = {"model": model, "task__generation": GREEDY}
    one, two = (trained(tmp_path / f"ranks{ranks}", texts, ranks, **options) for ranks in (1, 2))
    assert samples(one, 24) == samples(two, 24)
    losses = [line["loss"] for line in two.step_lines()]
    assert losses[:24] == pytest.approx([line["loss"] for line in one.step_lines()][:24], rel=1e-5)
    assert two.evaluation_lines()[-1]["evaluation"]["loss"] < base.evaluation_lines()[-1]["evaluation"]["loss"]
    before, after = (load_file(run.export_dir / "model.safetensors") for run in (base, two))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.split(".")[-2] for name in changed} == {"q", "v", "wo"}
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(two.export_dir, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(two.export_dir)
    for sample in samples(two):
        given = tokenizer(sample["source"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        output = merged.generate(input_ids=given, max_new_tokens=20)[0]
        assert tokenizer.decode(output, skip_special_tokens=True).strip() == sample["texts"][0]
