"""`dsft tokenizer train`: a SentencePiece model from text.

    python -P -m trainer.tokenizer_training --input PATH... --vocab-size N --output FILE.model [...]

Prints one JSON line: path, pieces, texts, characters, characters_per_token. Never imports torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from trainer.failures import UserError, run_tool

PAD_ID = 3
RECORDS = 1_000_000  # more text changes little, and SentencePiece holds all that it learns from in memory
_LINE = 4000  # characters: SentencePiece leaves longer lines out, in silence


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: Path, kind: str = "bpe", symbols: Sequence[str] = ()
) -> None:
    """Train a model with byte fallback; every text survives encode and decode. The same texts give the same file.

    Args:
        texts: learned from line by line.
        vocab_size: pieces, with the 256 bytes, the symbols and ids 0 unknown, 1 BOS, 2 EOS, 3 padding.
        path: ends in `.model`.
        kind: bpe or unigram.
        symbols: pieces that are never split, as the marks of a chat template.

    Raises:
        UserError: SentencePiece cannot make such a model of these texts.
    """
    import sentencepiece

    lines = (
        line[start : start + _LINE]
        for text in texts
        for line in text.splitlines()
        if line.strip()
        for start in range(0, len(line), _LINE)
    )
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=file,
                model_type=kind,
                vocab_size=vocab_size,
                byte_fallback=True,
                user_defined_symbols=["\n", *symbols],  # SentencePiece learns from lines: it never sees their ends
                # white space is meaning, in code above all
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * _LINE,  # in bytes
                pad_id=PAD_ID,
                num_threads=1,  # else not the same file twice
                minloglevel=2,
            )
        temporary.replace(path)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2].strip() or str(error)
        raise UserError(f"SentencePiece cannot learn {vocab_size} pieces from this text: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def texts_of(paths: Sequence[str], format_name: str, columns: Sequence[str], limit: int) -> Iterator[str]:
    """Texts of records spread evenly over all sources, at most ``limit`` of each: of ``columns``, or all that are text.

    Raises:
        DataError: a source or a record cannot be read.
        UserError: a record has none of the columns.
    """
    from trainer.config.schema import DataSource
    from trainer.data.sources import open_source
    from trainer.failures import DataError

    for path in paths:
        source = open_source(DataSource.model_validate({"path": path, "format": format_name}))
        count = min(source.records, limit)
        for start in range(0, count, 1000):
            numbers = [place * source.records // count for place in range(start, min(start + 1000, count))]
            for number, (record, problem) in zip(numbers, source.read(numbers), strict=True):
                if record is None:
                    raise DataError(problem)
                chosen = columns or list(record)
                found = [record[name] for name in chosen if isinstance(record.get(name), str)]
                if not found:
                    has = ", ".join(map(repr, record))
                    raise UserError(f"{source.where(number)}: no text in it (it has {has}); name columns by --column")
                yield from found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--type", default="bpe")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--column", action="append", default=[])
    parser.add_argument("--symbol", action="append", default=[])
    parser.add_argument("--records", type=int, default=RECORDS)
    options = parser.parse_args(arguments)
    return run_tool(lambda: _train(options))


def _train(options: argparse.Namespace) -> dict[str, object]:
    from trainer.config.schema import ModelConfig
    from trainer.tokenizer import load_tokenizer

    if options.output.suffix != ".model":
        raise UserError(f"--output {options.output}: a SentencePiece model's name ends in .model")
    if options.output.exists():
        raise UserError(f"{options.output} is there already, and models may have been trained with it: name another")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    seen = [0, 0]

    def counted() -> Iterator[str]:
        for text in texts_of(options.input, options.format, options.column, options.records):
            seen[0] += 1
            seen[1] += len(text)
            yield text

    train_sentencepiece(counted(), options.vocab_size, options.output, options.type, options.symbol)
    tokenizer = load_tokenizer(ModelConfig.model_validate({"path": "-", "tokenizer": str(options.output)}))
    characters = tokens = 0
    for text in texts_of(options.input, options.format, options.column, 1000):
        characters += len(text)
        tokens += len(tokenizer.encode_flat([text])[0])
    return {
        "path": str(options.output),
        "pieces": tokenizer.vocab_size,
        "texts": seen[0],
        "characters": seen[1],
        "characters_per_token": round(characters / max(tokens, 1), 3),
    }


if __name__ == "__main__":
    sys.exit(main())
