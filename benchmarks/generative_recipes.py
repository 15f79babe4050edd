"""What `generative_scores.py` trains on texts: public data as records, small models from random weights, baselines.

Each recipe writes its data below a folder and says what a model that has learned nothing would score. `data` is the
folder of the public data sets: multi30k-en-de, e2e-nlg, gsm8k-test, mbpp, humaneval, tinyshakespeare, nlvr, each in a
folder of its own, at any depth, with the files of its publisher.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]
Scores = dict[str, float]

BODY = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


@dataclass(frozen=True)
class Recipe:
    """One training run and what it has to beat.

    Attributes:
        judged: the score that is compared with the baselines.
        counted: how the baselines by counts of tokens are to be computed: "loss" of unigrams and bigrams.
        beats: whether the recipe is expected to beat its baselines.
    """

    task: dict[str, Any]
    model: dict[str, Any]
    train: Path
    evaluation: list[dict[str, Any]]
    sequence_length: int
    batch: int
    steps: int
    learning_rate: float
    judged: str
    baselines: dict[str, Scores] = field(default_factory=dict)
    counted: bool = False
    beats: bool = True
    source: dict[str, Any] = field(default_factory=dict)


def multi30k(data: Path, folder: Path) -> Recipe:
    """English to German by an encoder-decoder model."""
    train, test = _multi30k(data)
    return _seq2seq(folder, "translation", ("bleu", "chrf"), train, test, 1500, steps=400, batch=32, judged="bleu")


def multi30k_decoder(data: Path, folder: Path) -> Recipe:
    """The same by a decoder alone, through a template of causal-lm."""
    train, test = _multi30k(data)
    _pieces(folder, (r[name] for r in train for name in ("source", "target")), 1500)
    template = {"prompt": "{source} =", "completion": " {target}"}
    task = {"type": "causal-lm", "metrics": ["bleu", "chrf"]}
    task |= {"generation": {"max_new_tokens": 40, "batch_size": 50}}
    baselines = _copies([r["source"] for r in test], [[r["target"]] for r in test], ("bleu", "chrf"), train)
    options = {"sequence_length": 256, "batch": 16, "steps": 300, "learning_rate": 2e-3}
    return Recipe(
        task,
        _llama(folder, 1500, 128, 4),
        write(folder / "train.jsonl", train),
        [{"path": str(write(folder / "test.jsonl", test)), "template": template}],
        judged="bleu",
        baselines=baselines,
        source={"template": template},
        **options,
    )


def e2e(data: Path, folder: Path) -> Recipe:
    """E2E NLG: a text from attributes of a restaurant, scored against all its references."""
    train = [{"source": row["mr"], "target": row["ref"]} for row in rows(find(data, "e2e-nlg/devset.csv"))]
    found: dict[str, list[str]] = {}
    for row in rows(find(data, "e2e-nlg/testset_w_refs.csv")):
        found.setdefault(row["mr"], []).append(row["ref"])
    test = [{"source": source, "target": targets} for source, targets in found.items()][::9]
    metrics = ("bleu", "chrf", "rougeL")
    return _seq2seq(folder, "summarization", metrics, train, test, 800, steps=240, batch=32, judged="bleu")


def gsm8k(data: Path, folder: Path) -> Recipe:
    """Word problems: the worked answers of held-out questions, token by token, and the numbers they end in."""
    made = lines(find(data, "gsm8k-test/test.json"))
    records = [{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in made]
    held_out, train = records[::10], [r for n, r in enumerate(records) if n % 10]
    ends = Counter(r["completion"].rpartition("#### ")[2] for r in train)
    best = ends.most_common(1)[0][0]
    share = sum(r["completion"].endswith(f"#### {best}") for r in held_out) / len(held_out)
    task = {"type": "causal-lm", "generation": {"max_new_tokens": 160, "batch_size": 40}, "metrics": ["final_answer"]}
    return _causal(folder, task, train, held_out, 1000, 120, {f"always {best}": {"final_answer": share}})


def shakespeare(data: Path, folder: Path) -> Recipe:
    """Plain text: the last tenth of the speeches is held out."""
    text = find(data, "tinyshakespeare/tinyshakespeare.txt").read_text()
    pieces: list[str] = [""]
    for speech in text.split("\n\n"):
        if len(pieces[-1]) + len(speech) > 500:
            pieces.append("")
        pieces[-1] += speech[:1000] + "\n\n"
    records = [{"text": piece} for piece in pieces]
    cut = len(records) * 9 // 10
    return _causal(folder, {"type": "causal-lm"}, records[:cut], records[cut:], 1000, 120, {})


def mbpp(data: Path, folder: Path) -> Recipe:
    """Python for a sentence: the programs of held-out problems, token by token, and whether written ones pass."""
    records = lines(find(data, "mbpp/mbpp.jsonl"))
    held_out, train = records[::10], [r for n, r in enumerate(records) if n % 10]
    return _causal(folder, _programs(160), train, held_out, 1000, 80, {"no program": {"pass@1": 0.0}})


def mbpp_learned(data: Path, folder: Path) -> Recipe:
    """40 problems learned by heart: what a model writes of them passes their tests."""
    records = lines(find(data, "mbpp/mbpp.jsonl"))[:40]
    recipe = _causal(folder, _programs(250), records, records, 800, 250, {"no program": {"pass@1": 0.0}})
    return _by_heart(recipe, folder)


def humaneval_learned(data: Path, folder: Path) -> Recipe:
    """The same in HumanEval's layout."""
    path = find(data, "humaneval/HumanEval.jsonl.gz")
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    records = [r for r in records if len(r["prompt"] + r["canonical_solution"]) < 900][:40]
    recipe = _causal(folder, _programs(250), records, records, 800, 250, {"no body": {"pass@1": 0.0}})
    return _by_heart(recipe, folder)


def _by_heart(recipe: Recipe, folder: Path) -> Recipe:
    model = _llama(folder, 800, 160, 4)
    return replace(recipe, model=model, judged="pass@1", counted=False, learning_rate=2e-3)


def _programs(tokens: int) -> dict[str, Any]:
    generation = {"max_new_tokens": tokens, "batch_size": 30}
    return {"type": "causal-lm", "generation": generation, "code_execution": {"enabled": True}}


def _causal(
    folder: Path,
    task: dict[str, Any],
    train: Records,
    test: Records,
    vocabulary: int,
    steps: int,
    baselines: dict[str, Scores],
) -> Recipe:
    texts = (value for r in train for value in r.values() if isinstance(value, str))
    _pieces(folder, (line for text in texts for line in text.splitlines()), vocabulary)
    return Recipe(
        task,
        _llama(folder, vocabulary, 128, 4),
        write(folder / "train.jsonl", train),
        [{"path": str(write(folder / "test.jsonl", test))}],
        512,
        4,
        steps,
        3e-3,
        "loss",
        baselines,
        counted=True,
    )


def _seq2seq(
    folder: Path,
    task: str,
    metrics: Sequence[str],
    train: Records,
    test: Records,
    vocabulary: int,
    *,
    steps: int,
    batch: int,
    judged: str,
) -> Recipe:
    _pieces(folder, (r[name] for r in train for name in ("source", "target")), vocabulary)
    references = [r["target"] if isinstance(r["target"], list) else [r["target"]] for r in test]
    model = {
        "model_type": "bart",
        "vocab_size": vocabulary,
        "d_model": 128,
        "encoder_ffn_dim": 512,
        "decoder_ffn_dim": 512,
        **BODY,
        "dropout": 0.0,
        "init_std": 0.1,  # about 1 / sqrt(d_model): from 0.02, meant for wider models, it learns one text for all
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
    return Recipe(
        {"type": task, "generation": {"max_new_tokens": 64, "batch_size": 50}, "metrics": list(metrics)},
        {"config": model, "tokenizer": str(folder / "pieces.model")},
        write(folder / "train.jsonl", train),
        [{"path": str(write(folder / "test.jsonl", test))}],
        160,
        batch,
        steps,
        2e-3,
        judged,
        _copies([r["source"] for r in test], references, metrics, train),
    )


def _copies(sources: list[str], references: list[list[str]], metrics: Sequence[str], train: Records) -> Any:
    """Scores of the sources as they are, and of one training target for all."""
    from trainer.config.generation import TranslationTask
    from trainer.text_metrics import text_scores

    one = Counter(r["target"] for r in train).most_common(1)[0][0]
    settings = TranslationTask(type="translation")
    written = {"copying the source": sources, "the most frequent target": [one] * len(sources)}
    return {name: text_scores(metrics, texts, references, settings)[0] for name, texts in written.items()}


def _multi30k(data: Path) -> tuple[Records, Records]:
    folder = find(data, "multi30k-en-de/train.en").parent

    def pairs(name: str) -> Records:
        texts = [(folder / f"{name}.{language}").read_text().split("\n")[:-1] for language in ("en", "de")]
        return [{"source": en, "target": de} for en, de in zip(*texts, strict=True)]

    return pairs("train"), pairs("test_2016_flickr")[:100]


def _llama(folder: Path, vocabulary: int, hidden: int, layers: int) -> dict[str, Any]:
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 5 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return {"config": config, "tokenizer": str(folder / "pieces.model")}


def _pieces(folder: Path, texts: Iterable[str], vocabulary: int) -> None:
    """A SentencePiece tokenizer trained on these lines; bytes stand for what it does not know."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(texts)),
        model_prefix=str(folder / "pieces"),
        vocab_size=vocabulary,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        num_threads=1,
    )


def find(data: Path, name: str) -> Path:
    folder, _, _ = name.partition("/")
    found = sorted(path for path in data.rglob(name) if path.is_file())
    if not found:
        raise SystemExit(f"{data} has no {name}: put the files of {folder} into a folder {folder} below it")
    return found[0]


def lines(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path: Path) -> Records:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, records: Records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
