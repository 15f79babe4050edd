"""One global order: the same batches at any number of ranks, for any micro-batch size, after any restart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_streams import (
    Words,
    cache,  # noqa: F401  # a fixture of every test here
    digests,
    options,
    rank_results,
    run_ranks,
    tokens_seen,
    write_source,
)

from trainer.config.schema import DataSource
from trainer.data.sample import Sample
from trainer.data.stream import BatchStream
from trainer.failures import DataError


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 16), min_size=1, max_size=40),
    window=st.integers(1, 12),
    seed=st.integers(0, 5),
    world_size=st.integers(2, 4),
    micro=st.integers(1, 3),
    size=st.integers(1, 6),
    packing=st.booleans(),
    epochs=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_batches_do_not_depend_on_ranks_or_micro_batches(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    window: int,
    seed: int,
    world_size: int,
    micro: int,
    size: int,
    packing: bool,
    epochs: float,
) -> None:
    source = write_source(tmp_path_factory.mktemp("data") / "a.jsonl", lengths)
    changes: dict[str, Any] = {"window_documents": window, "seed": seed, "packing": packing, "epochs": epochs}
    alone = run_ranks((source,), 1, size=size, **changes)
    several = run_ranks((source,), world_size, micro=micro, size=size, **changes)
    assert digests(several) == digests(alone)
    for batches in zip(*several, strict=True):
        assert len({json.dumps(batch.state) for batch in batches}) == 1
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        shares = [m.sequences for batch in batches for m in batch.micro_batches]
        assert sum(len(share) for share in shares) == batches[0].sequences
        assert sum(s.target_tokens for share in shares for s in share) == batches[0].target_tokens
        assert sum(s.length for share in shares for s in share) == batches[0].tokens
    if epochs >= 1:
        expected = Counter({1 + i: n * int(epochs) for i, n in enumerate(lengths)})
        assert tokens_seen(several) == expected
    else:
        assert len(tokens_seen(several)) == round(epochs * len(lengths))
    last = several[0][-1] if several[0] else None
    assert last is None or last.progress == epochs


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=6, max_size=40),
    cut=st.integers(0, 30),
    world_sizes=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    packing=st.booleans(),
)
def test_resume_after_any_batch_at_another_world_size(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    cut: int,
    world_sizes: tuple[int, int],
    packing: bool,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    sources = (write_source(folder / "a.jsonl", lengths), write_source(folder / "b.jsonl", lengths[::2], first=1000))
    whole = run_ranks(sources, world_sizes[0], epochs=2.0, packing=packing)
    cut %= len(whole[0])
    state = json.loads(json.dumps(whole[0][cut].state))  # as a checkpoint keeps it
    rest = run_ranks(sources, world_sizes[1], epochs=2.0, packing=packing, state=state)
    assert digests(rest) == digests(whole)[cut + 1 :]


def test_changed_data_is_refused_at_resume(tmp_path: Path) -> None:
    sources = (write_source(tmp_path / "a.jsonl", [8] * 32), write_source(tmp_path / "b.jsonl", [4] * 8, first=50))
    whole = run_ranks(sources, 1)[0]
    state = json.loads(json.dumps(whole[1].state))
    path = tmp_path / "a.jsonl"
    content = path.read_text()

    def resumed(**changes: Any) -> list[int]:
        return digests(run_ranks(sources, 2, state=state, **changes))

    expected = digests([whole])[2:]
    (tmp_path / "copy").write_text(content)  # another inode, another time, the same data
    (tmp_path / "copy").replace(path)
    assert resumed() == expected
    path.write_text(content.replace(" 7", " 9", 1))  # the same size
    with pytest.raises(
        DataError, match=r"data\.train\[0\]: a\.jsonl has changed since the last checkpoint \(other content"
    ):
        resumed()
    path.write_text(content + '{"text": "1 2"}\n')
    with pytest.raises(DataError, match=r"32 records before, 33 now\); put it back"):
        resumed()
    path.write_text(content.replace('"text": "', '"text": "9'))
    assert len(resumed(allow_changed=True)) == len(expected)
    assert not set(resumed(allow_changed=True)) & set(expected)
    path.write_text(content)
    with pytest.raises(DataError, match=r"data\.seed was 3 before and is 4 now"):
        resumed(seed=4)
    with pytest.raises(DataError, match="the tokenizer has changed since the last checkpoint"):
        resumed(tokenizer="others")
    with pytest.raises(DataError, match="other sources"):
        run_ranks(sources[:1], 1, state=state)
    assert run_ranks(sources[:1], 1, state=state, allow_changed=True)[0]
    assert resumed() == expected


def test_a_file_that_disappears_mid_run(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", [16] * 1000)
    batches = iter(
        BatchStream((source,), Words(), options(), global_batch_size=4, micro_batch_size=4, gather=lambda rows: [rows])
    )
    next(batches)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file"):
        list(batches)


def test_order_depends_on_the_seed_and_the_epoch(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", [8] * 32)
    first = digests(run_ranks((source,), 1, epochs=2.0))
    assert digests(run_ranks((source,), 1, epochs=2.0)) == first
    assert digests(run_ranks((source,), 1, epochs=2.0, seed=4)) != first
    assert first[: len(first) // 2] != first[len(first) // 2 :]


def test_limit_ends_the_stream_and_without_epochs_it_goes_round(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", [8] * 5)
    assert len(run_ranks((source,), 2, limit=11, epochs=None)[0]) == 11


def test_data_with_nothing_to_learn_ends_in_an_error(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", [1] * 5)
    with pytest.raises(DataError, match="nothing to learn"):
        run_ranks((source,), 2, epochs=None)


def test_long_records(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a.jsonl", [40, 5])
    results = {}
    for on_long in ("split", "truncate", "skip"):
        batches = run_ranks((source,), 1, on_long=on_long)[0]
        results[on_long] = sum(batch.target_tokens for batch in batches)
    # every target once: 39 + 4; the first piece's 15 + 4; the short record's 4
    assert results == {"split": 43, "truncate": 19, "skip": 4}
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: 40 tokens are more than data\.sequence_length \(16\)"):
        run_ranks((source,), 1, on_long="error")


def test_what_became_of_records_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "1 2 3"})
    lines = [good, "{broken", json.dumps({"text": 5}), json.dumps({"other": ""}), json.dumps({"text": "7"}), good]
    path.write_text("\n".join(lines) + "\n")
    stream = BatchStream(
        (DataSource(path=str(path)),),
        Words(),
        options(on_bad_record="skip"),
        global_batch_size=1,
        micro_batch_size=1,
        gather=lambda rows: [rows],
    )
    assert sum(batch.target_tokens for batch in stream) == 4
    assert stream.counts() == {"bad": 3, "skipped_long": 0, "nothing_to_learn": 1, "split": 0, "truncated": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "1 2', r"line 3: not valid JSON"),
        ('["text"]', r"line 3: expected a JSON object, found a JSON array"),
        ('{"text": 5}', r"line 3: column 'text' is int, expected a string"),
        ('{"text": null}', r"line 3: column 'text' is null"),
        ('{"txt": "1"}', r"line 3: no column 'text'; the record has 'txt'"),
        (b'{"text": "\xff\xfe"}', r"line 3: not UTF-8 \(byte 0xff\)"),
        (r'{"text": "1 \ud800 2"}', r"line 3: column 'text' holds half of a surrogate pair"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    good = b'{"text": "1 2"}\n'
    data = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "bad.jsonl").write_bytes(good + b"\n" + data + b"\n" + good)
    with pytest.raises(DataError, match=rf"bad\.jsonl, {message}"):
        run_ranks((DataSource(path=str(tmp_path / "bad.jsonl")),), 2)


def test_every_rank_names_the_bad_record_of_one(tmp_path: Path) -> None:
    """A rank that met it must not leave the others waiting in the exchange."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "1 2"}\n' * 6 + '{"text": é}\n')
    for error in rank_results((DataSource(path=str(path)),), 3):
        assert isinstance(error, DataError)
        assert "bad.jsonl, line 7: not valid JSON" in str(error)


def test_digest_covers_tokens_targets_and_boundaries(tmp_path: Path) -> None:
    from trainer.data.sample import PackedSequence
    from trainer.data.stream import digest

    def one(tokens: list[int], targets: list[int]) -> Sample:
        return Sample(np.array(tokens, dtype=np.int32), np.array(targets, dtype=bool))

    base = digest(0, PackedSequence((one([1, 2, 3, 4], [0, 1, 0, 1]),)))
    others = [
        digest(1, PackedSequence((one([1, 2, 3, 4], [0, 1, 0, 1]),))),
        digest(0, PackedSequence((one([1, 2, 3, 5], [0, 1, 0, 1]),))),
        digest(0, PackedSequence((one([1, 2, 3, 4], [0, 1, 1, 1]),))),
        digest(0, PackedSequence((one([1, 2], [0, 1]), one([3, 4], [0, 1])))),
    ]
    assert len({base, *others}) == 5
    assert all(0 <= value < 1 << 63 for value in (base, *others))
