"""One interface over a Hugging Face folder, a tokenizer.json and a SentencePiece model.

Light libraries (`tokenizers`, `sentencepiece`) do the work; transformers, which takes two seconds to import, is used
only for folders that hold neither file. Encoding never adds special tokens: tasks place BOS and EOS themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import ModelConfig
from trainer.failures import DataError

# Words that merges, white space, capitals, digits, and bytes that no piece covers show in
_SAMPLE = "The  quick brown fox, 12345 times: naïve café\n\tdef f(x): return x**2  # 日本語 🙂 Überraschung"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_TOGETHER = 64  # texts of one call: what it returns is large, and dear to allocate, for thousands


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        origin: where it came from.
        vocab_size: largest id + 1.
        bos_id: the token that begins every text, None where the tokenizer does not begin texts with one.
        eos_id: the token that ends a text, or None.
        pad_id: the padding token, or None.
        chat_template: Jinja template of the tokenizer, or None.
        special_tokens: `bos_token` and the like by name, as chat templates use them.
        decode: the text of token ids, special tokens left out.
        show: the text of token ids with special tokens written out.
        save: writes what `AutoTokenizer.from_pretrained(folder)` needs to give the same ids.
        backend: the `tokenizers.Tokenizer` behind it, with its own template of special tokens; None for slow ones.
        unk_id: what stands for all that the vocabulary lacks; None: nothing does.
    """

    origin: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None
    special_tokens: dict[str, str]
    _encode: Callable[[list[str]], list[list[int]]]
    _encode_with_starts: Callable[[list[str]], list[tuple[list[int], list[int]]]]
    decode: Callable[[Sequence[int]], str]
    show: Callable[[Sequence[int]], str]
    save: Callable[[Path], None]
    backend: Any = None
    unk_id: int | None = None

    def fingerprint(self) -> str:
        """A hash of what makes ids of a text: its vocabulary and special tokens, the chat template, and a sample."""
        vocabulary = sorted(self.backend.get_vocab().items()) if self.backend is not None else self.vocab_size
        parts = (vocabulary, self.bos_id, self.eos_id, self.chat_template, self.special_tokens, self._encode([_SAMPLE]))
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""
        flat, ends = self.encode_flat(texts)
        return np.split(flat, ends[:-1]) if len(ends) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(token ids of all texts, int32 [tokens]; where those of each end, int64 [texts]), without special tokens."""
        found: list[list[int]] = []
        for start in range(0, len(texts), _TOGETHER):
            found += self._encode(list(texts[start : start + _TOGETHER]))
        ends = np.cumsum(np.fromiter(map(len, found), dtype=np.int64, count=len(found)))
        total = int(ends[-1]) if len(ends) else 0
        return np.fromiter(chain.from_iterable(found), dtype=np.int32, count=total), ends

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As encode_batch, with the character at which each token begins, int64.

        Raises:
            DataError: the tokenizer does not tell (a slow one of transformers).
        """
        found = self._encode_with_starts(list(texts)) if texts else []
        return [(np.asarray(ids, dtype=np.int32), np.asarray(starts, dtype=np.int64)) for ids, starts in found]


# of tasks without texts
NO_TOKENIZER = Tokenizer(
    origin="no tokenizer",
    vocab_size=0,
    bos_id=None,
    eos_id=None,
    pad_id=None,
    chat_template=None,
    special_tokens={},
    _encode=lambda texts: [[] for _ in texts],
    _encode_with_starts=lambda texts: [([], []) for _ in texts],
    decode=lambda ids: "",
    show=lambda ids: "",
    save=lambda folder: None,
)


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer of a config.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    origin = config.tokenizer or config.processor or config.path or ""
    key = "model.tokenizer" if config.tokenizer else "model.processor" if config.processor else "model.path"
    path = Path(origin)
    try:
        if path.is_file():
            return _sentencepiece(path) if path.suffix == ".model" else _fast(path, {}, None)
        folder = path if path.is_dir() else _of_hub(origin)
        if folder is not None:
            return _folder(folder, config.trust_remote_code)
        return _transformers(origin, config.trust_remote_code)
    except DataError:
        raise
    except Exception as error:  # the libraries raise bare Exception, RuntimeError, OSError, ...
        raise DataError(
            f"{key}: the tokenizer of {origin!r} cannot be loaded: {' '.join(str(error).split())}; expected a Hugging "
            "Face folder or hub id, a tokenizer.json or a SentencePiece .model"
        ) from error


def _of_hub(name: str) -> Path | None:
    """The folder in the hub's cache that now has the files of a fast tokenizer; None where the hub has no such ones."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        folder = Path(hf_hub_download(name, _FILES[0])).parent
    except EntryNotFoundError:
        return None
    for file in _FILES[1:]:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(name, file)
    return folder


def _folder(path: Path, trust_remote_code: bool) -> Tokenizer:
    if (path / "tokenizer.json").is_file():
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (path / name).is_file():
                settings |= json.loads((path / name).read_text(encoding="utf-8"))
        return _fast(path / "tokenizer.json", settings, path)
    models = sorted(path.glob("*.model"))
    if len(models) == 1 and not (path / "tokenizer_config.json").is_file():
        return _sentencepiece(models[0])
    return _transformers(str(path), trust_remote_code)


def _fast(path: Path, settings: dict[str, Any], folder: Path | None) -> Tokenizer:
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(path))
    fast.no_truncation()
    fast.no_padding()

    def token_id(*names: str) -> int | None:
        for name in names:
            token = settings.get(name, name if name.startswith("<") or name.startswith("[") else None)
            token = token.get("content") if isinstance(token, dict) else token
            found: int | None = fast.token_to_id(token) if token else None
            if found is not None:
                return found
        return None

    eos = token_id("eos_token", *(() if settings else ("</s>", "<|endoftext|>", "<eos>", "<|im_end|>")))
    bos = token_id("bos_token", *(() if settings else ("<s>", "<bos>")))
    pad = token_id("pad_token", *(() if settings else ("<pad>", "[PAD]")))
    begins = fast.encode("a").ids[:1] == [bos]  # what the tokenizer itself does with a text

    def save(target: Path) -> None:
        if folder is not None:
            for name in _FILES:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)
        else:
            # of the family of BERT, whose models tell the texts of a pair apart by these
            inputs = ["input_ids", "token_type_ids", "attention_mask"]
            more = {"model_input_names": inputs} if fast.token_to_id("[CLS]") is not None else {}
            _save_fast(fast, target, eos, bos if begins else None, pad, **more)

    unk = token_id("unk_token")
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    special = {name: str(fast.id_to_token(token)) for name, token in named.items() if token is not None}
    template = settings.get("chat_template")
    if folder is not None and (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return Tokenizer(
        str(folder or path),
        max(fast.get_vocab(with_added_tokens=True).values()) + 1,
        bos if begins else None,
        eos,
        pad,
        _default_template(template),
        special,
        **_calls(fast),
        save=save,
        backend=fast,
        unk_id=fast.token_to_id(getattr(fast.model, "unk_token", None) or "<unk>") if unk is None else unk,
    )


def _default_template(found: Any) -> str | None:
    """A tokenizer's chat template; of several with names the one called default."""
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None


def _calls(fast: Any) -> dict[str, Callable[..., Any]]:
    """What a `tokenizers.Tokenizer` does of a Tokenizer."""

    def encode_with_starts(texts: list[str]) -> list[tuple[list[int], list[int]]]:
        found = fast.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, [start for start, _ in encoding.offsets]) for encoding in found]

    return {
        "_encode": lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)],
        "_encode_with_starts": encode_with_starts,
        "decode": lambda ids: str(fast.decode(ids)),
        "show": lambda ids: str(fast.decode(ids, skip_special_tokens=False)),
    }


def _save_fast(fast: Any, target: Path, eos: int | None, bos: int | None, pad: int | None, **more: Any) -> None:
    fast.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        **more,
    }
    for name, token in (("eos_token", eos), ("bos_token", bos), ("pad_token", pad)):
        if token is not None:
            settings[name] = fast.id_to_token(token)
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    # its exact fast form does the work, here and in the export, so that the two cannot differ
    fast = fast_from_sentencepiece(path)

    def optional(token: int) -> int | None:
        return token if token >= 0 else None

    bos, eos, pad = optional(model.bos_id()), optional(model.eos_id()), optional(model.pad_id())
    if bos is not None:
        from tokenizers.processors import TemplateProcessing

        name = fast.id_to_token(bos)
        fast.post_processor = TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, bos)]
        )

    def save(target: Path) -> None:
        _save_fast(fast, target, eos, bos, pad, unk_token=model.id_to_piece(model.unk_id()))
        shutil.copyfile(path, target / "tokenizer.model")

    return Tokenizer(
        str(path),
        model.get_piece_size(),
        bos,
        eos,
        pad,
        None,
        {name: fast.id_to_token(i) for name, i in (("bos_token", bos), ("eos_token", eos)) if i is not None},
        **_calls(fast),
        save=save,
        backend=fast,
        unk_id=optional(model.unk_id()),
    )


def fast_from_sentencepiece(path: Path) -> Any:
    """The `tokenizers.Tokenizer` that gives the ids of a SentencePiece model (unigram or BPE).

    Where a unigram model has several segmentations of the same score, the two may choose different ones of them.

    Raises:
        DataError: the model is of another type.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers
    from tokenizers import Tokenizer as Fast

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        fast = Fast(models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    elif trainer.model_type == trainer.BPE:
        ids = {piece: index for index, (piece, _) in enumerate(pieces)}
        merges = [
            (piece[:cut], piece[cut:], index)
            for piece, index in ids.items()
            for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids
        ]
        # SentencePiece joins the pair whose result has the best score; ids of BPE models fall with the score
        merges.sort(key=lambda merge: (-pieces[merge[2]][1], merge[2]))
        fast = Fast(
            models.BPE(
                ids,
                [(left, right) for left, right, _ in merges],
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    else:
        raise DataError(f"{path}: only unigram and BPE SentencePiece models can be used")
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        # spaces alone: other white space that the character map has left is text to SentencePiece
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    steps.append(normalizers.Replace(" ", "▁"))
    fast.normalizer = normalizers.Sequence(steps)
    last = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    special = [
        AddedToken(piece.piece, normalized=False, special=piece.type == piece.CONTROL)
        for piece in proto.pieces
        if piece.type in (piece.CONTROL, piece.USER_DEFINED)
    ]
    fast.add_tokens(special)
    return fast


def _transformers(origin: str, trust_remote_code: bool) -> Tokenizer:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(origin, trust_remote_code=trust_remote_code)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # made of a folder without its files
        raise DataError(
            f"{origin} has no tokenizer: put the files of the model's own there (tokenizer.json or what it has), or "
            "name another in model.tokenizer"
        )
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    fast = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if fast is not None:
        fast.no_truncation()
        fast.no_padding()

    def refuse_starts(_: list[str]) -> list[tuple[list[int], list[int]]]:
        raise DataError(f"{origin}: a slow tokenizer does not tell where its tokens begin, as `messages` needs")

    slow: dict[str, Callable[..., Any]] = {
        "_encode": lambda texts: list(tokenizer(texts, add_special_tokens=False)["input_ids"]) if texts else [],
        "_encode_with_starts": refuse_starts,
        "decode": lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        "show": lambda ids: str(tokenizer.decode(ids)),
    }
    return Tokenizer(
        origin,
        max(tokenizer.get_vocab().values()) + 1,
        tokenizer.bos_token_id if begins else None,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        _default_template(getattr(tokenizer, "chat_template", None)),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        **(_calls(fast) if fast is not None else slow),
        save=lambda target: tokenizer.save_pretrained(target),
        backend=fast,
        unk_id=tokenizer.unk_token_id,
    )
