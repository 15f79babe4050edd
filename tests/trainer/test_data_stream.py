"""One global order: the same batches at any number of ranks, for any micro-batch size, after any restart."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.schema import DataSource
from trainer.data.sample import Sample
from trainer.data.stream import BatchStream, GlobalBatch
from trainer.data.windows import Options
from trainer.failures import DataError
from trainer.planning.mixture import Mixture, expected_mixture, source_epochs, source_weights


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices of hundreds of small files do not belong into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Words:
    """A task without a tokenizer: a record's `text` is a list of numbers, the first of which is its prompt."""

    structured = optional = paths = frozenset[str]()
    splits, pieces, predicts, loads = True, False, False, False

    def columns(self, source_columns: dict[str, str], record: dict[str, Any]) -> dict[str, str]:
        return {"text": "text"}

    def encode(self, records: Sequence[dict[str, Any]]) -> list[Sample]:
        made = []
        for record in records:
            tokens = np.array([int(word) for word in record["text"].split()], dtype=np.int32)
            made.append(Sample(tokens, np.arange(len(tokens)) > 0))
        return made

    def load(self, sample: Sample) -> Sample:
        return sample


def options(rank: int = 0, world_size: int = 1, **changes: Any) -> Options:
    values: dict[str, Any] = {
        "sequence_length": 16,
        "packing": True,
        "seed": 3,
        "shuffle": True,
        "epochs": 1.0,
        "on_long": "split",
        "on_bad_record": "error",
        "window_documents": 7,
        "rank": rank,
        "world_size": world_size,
    }
    return Options(**{**values, **changes})


def write_source(path: Path, lengths: Sequence[int], first: int = 1) -> DataSource:
    """Record i holds the token first + i, `lengths[i]` times."""
    lines = [json.dumps({"text": " ".join([str(first + i)] * n)}) for i, n in enumerate(lengths)]
    path.write_text("\n".join(lines) + "\n")
    return DataSource(path=str(path))


def run_ranks(sources: tuple[DataSource, ...], world_size: int, **changes: Any) -> list[list[GlobalBatch]]:
    """Batches of each rank; a rank's error is raised here."""
    results = rank_results(sources, world_size, **changes)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise next((f for f in failures if not isinstance(f, threading.BrokenBarrierError)), failures[0])
    return results


def rank_results(
    sources: tuple[DataSource, ...],
    world_size: int,
    *,
    micro: int = 1,
    size: int = 4,
    state: dict[str, Any] | None = None,
    limit: int | None = None,
    allow_changed: bool = False,
    **changes: Any,
) -> list[Any]:
    """Batches or the error of each rank; ranks are threads with a real exchange between them."""
    shared: list[Any] = [None] * world_size
    barrier = threading.Barrier(world_size, timeout=60)
    results: list[Any] = [None] * world_size

    def rank_main(rank: int) -> None:
        def gather(rows: np.ndarray) -> list[np.ndarray]:
            shared[rank] = rows
            barrier.wait()
            found = list(shared)
            barrier.wait()
            return found

        try:
            stream = BatchStream(
                sources,
                Words(),
                options(rank, world_size, **changes),
                global_batch_size=size,
                micro_batch_size=micro,
                gather=gather,
                state=state,
                allow_changed=allow_changed,
                limit=limit,
            )
            results[rank] = list(stream)
        except BaseException as error:
            if not isinstance(error, DataError):  # those come on every rank; to abort would race with their waking up
                barrier.abort()
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def digests(ranks: list[list[GlobalBatch]]) -> list[int]:
    return [sum(batch.digest for batch in batches) % (1 << 63) for batches in zip(*ranks, strict=True)]


def tokens_seen(ranks: list[list[GlobalBatch]]) -> Counter[int]:
    return Counter(
        int(token)
        for batches in ranks
        for batch in batches
        for micro_batch in batch.micro_batches
        for sequence in micro_batch.sequences
        for sample in sequence.samples
        for token in sample.tokens
    )


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


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    times=st.lists(st.sampled_from([None, 0.5, 1.0, 2.5, 3.0, "repeat"]), min_size=3, max_size=3),
    weights=st.lists(st.sampled_from([0.3, 1.0, 2.5]), min_size=3, max_size=3) | st.none(),
    epochs=st.sampled_from([None, 1.0, 2.0]),
    world_sizes=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    cut=st.integers(0, 30),
)
def test_each_source_is_taken_as_often_as_it_says(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    times: list[float | str | None],
    weights: list[float] | None,
    epochs: float | None,
    world_sizes: tuple[int, int],
    cut: int,
) -> None:
    """Exactly so, at any world size and after a resume; with `epochs`, those that repeat end with the others."""
    folder = tmp_path_factory.mktemp("data")
    sources = tuple(
        write_source(folder / f"{i}.jsonl", [10] * size, first=1000 * i).model_copy(
            update={"epochs": times[i], "weight": weights[i] if weights else None}
        )
        for i, size in enumerate(sizes)
    )
    taken = [source_epochs(source, epochs) for source in sources]
    repeats = any(count is None for count in taken)
    limit = 40 if repeats and (epochs is None or all(count is None for count in taken)) else None
    whole = run_ranks(sources, world_sizes[0], size=3, epochs=epochs, limit=limit)
    seen = tokens_seen(whole)
    for i, (size, count) in enumerate(zip(sizes, taken, strict=True)):
        of_source = [seen[1000 * i + number] // 10 for number in range(size)]
        if count is not None and limit is None:
            assert sum(of_source) == round(count * size)
            assert set(of_source) <= {int(count), math.ceil(count)}  # nothing once more before all the others
        else:
            assert max(of_source) - min(of_source) <= 1
            assert count is None or sum(of_source) <= round(count * size)
    drawn = sum(seen.values()) // 10
    if limit is None and drawn:
        mixture = expected_mixture(sizes, taken, source_weights(sources, sizes, taken), float("inf"))
        halves = sum(0.5 for count, size in zip(taken, sizes, strict=True) if count and (count * size) % 1)
        slack = len(sizes) + sum(weight / min(weights or [1]) for weight in weights or []) + 12 * halves
        assert drawn == pytest.approx(mixture.sequences, abs=slack)
        if epochs is not None:
            assert whole[0][-1].progress == epochs
    if not whole[0]:
        return
    cut %= len(whole[0])
    state = json.loads(json.dumps(whole[0][cut].state))
    rest = run_ranks(
        sources, world_sizes[1], size=3, epochs=epochs, state=state, limit=None if limit is None else limit - cut - 1
    )
    assert digests(rest) == digests(whole)[cut + 1 :]


def test_an_exhausted_source_stops_and_one_that_repeats_goes_on(tmp_path: Path) -> None:
    """Equal weights, one document a sequence: the order of the sources, up to the end."""
    once = write_source(tmp_path / "once.jsonl", [16] * 2).model_copy(update={"weight": 1.0, "epochs": 1.0})
    thrice = write_source(tmp_path / "thrice.jsonl", [16] * 2, 1000).model_copy(update={"weight": 1.0, "epochs": 3.0})
    again = write_source(tmp_path / "again.jsonl", [16], 2000).model_copy(update={"weight": 1.0, "epochs": "repeat"})
    batches = run_ranks((once, thrice, again), 1, size=1, epochs=1.0)[0]
    order = [min(tokens_seen([[batch]])) // 1000 for batch in batches]
    assert order == [0, 1, 2, 0, 1, 2, 1, 2, 1, 2, 1, 2, 1]
    assert batches[2].progress == pytest.approx(2 / 8)  # of what ends
    longer = run_ranks((once, again), 1, size=2, epochs=None, limit=9)[0]
    assert sum(tokens_seen([longer])[token] for token in (1, 2)) == 2 * 16
    assert tokens_seen([longer])[2000] == 16 * 16
    steps = run_ranks((once, thrice), 1, size=1, epochs=None, limit=100)[0]
    assert len(steps) == 8  # both end before the steps do


def test_expected_mixture() -> None:
    endless = float("inf")
    # an epoch of each, by weight: the smaller is done after 20 of 30
    assert expected_mixture([10, 20], [1.0, 1.0], [1.0, 1.0], endless) == Mixture(30.0, (1.0, 1.0))
    # what repeats ends with the other
    assert expected_mixture([10, 20], [None, 1.0], [1.0, 1.0], endless) == Mixture(40.0, (2.0, 1.0))
    # steps end it first; then the one that ends gives way
    assert expected_mixture([10, 20], [1.0, None], [1.0, 1.0], 10.0) == Mixture(10.0, (0.5, 0.25))
    assert expected_mixture([10, 20], [1.0, None], [1.0, 1.0], 60.0) == Mixture(60.0, (1.0, 2.5))
    assert expected_mixture([10, 20], [2.0, 0.5], [3.0, 1.0], 1000.0) == Mixture(30.0, (2.0, 0.5))


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


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    small = write_source(tmp_path / "small.jsonl", [16] * 5).model_copy(update={"weight": 3.0})
    large = write_source(tmp_path / "large.jsonl", [16] * 50, first=1000)
    batches = run_ranks((small, large), 1, limit=25, epochs=None, size=4)[0]
    for count in (1, 7, 25):
        seen = tokens_seen([batches[:count]])
        from_small = sum(n for token, n in seen.items() if token < 1000) / 16
        assert from_small == pytest.approx(count * 4 * 0.75, abs=1)


def test_without_weights_sources_end_together(tmp_path: Path) -> None:
    small = write_source(tmp_path / "small.jsonl", [16] * 5)
    large = write_source(tmp_path / "large.jsonl", [16] * 50, first=1000)
    batches = run_ranks((small, large), 1, epochs=1.0, size=11)[0]
    for batch in batches:
        assert sum(n for token, n in tokens_seen([[batch]]).items() if token < 1000) == 16
    assert len(batches) == 5


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
