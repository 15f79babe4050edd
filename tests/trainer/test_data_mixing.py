"""How sources of a mix are drawn, how often each is taken, and where that ends."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_streams import (
    cache,  # noqa: F401  # a fixture of every test here
    digests,
    run_ranks,
    tokens_seen,
    write_source,
)

from trainer.data.order import next_source, strides
from trainer.planning.mixture import Mixture, expected_mixture, source_epochs, source_weights


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4))
def test_the_source_furthest_behind_its_share_is_next(weights: list[float]) -> None:
    every, drawn = strides(weights), [0] * len(weights)
    for _ in range(20):
        behind = [(drawn[i] + 1) / Fraction(weight) for i, weight in enumerate(weights)]
        index = next_source(drawn, every, [True] * len(weights))
        assert index == behind.index(min(behind))
        drawn[index] += 1
    assert next_source(drawn, every, [False] * len(weights)) is None


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
    assert [batch.progress for batch in rest[0]] == [batch.progress for batch in whole[0][cut + 1 :]]


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
