"""Records by position: indices, formats, globs, caches and their errors."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from trainer.config.schema import DataSource
from trainer.data.cache import cached
from trainer.data.formats import bytes as bytes_format
from trainer.data.packing import pack
from trainer.data.sources import Source, open_source
from trainer.failures import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_path(path: Path, **more: Any) -> Source:
    return open_source(DataSource(path=str(path), **more))


def all_records(source: Source) -> list[Any]:
    return [record for record, _ in source.read(range(source.records))]


def test_jsonl_with_blank_lines_crlf_bom_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n' + b" " * 99 + b'\n{"a": "\xc3\xa9"}\n{"a": 3}')
    assert all_records(open_path(path)) == [{"a": 1}, {"a": "é"}, {"a": 3}]


def test_index_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytes_format, "BLOCK", 7)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n}) + "\n" * (1 + n % 3) for n in range(50)))
    assert all_records(open_path(path)) == [{"n": n} for n in range(50)]


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    source = open_path(path)
    os.utime(path, ns=(5, 5))  # a new date alone is none
    assert source.read([1])[0][0] == {"a": 2}
    path.write_text('{"a": 3}\n{"a": 4}\n')  # the same size
    with pytest.raises(DataError, match=r"a\.jsonl has changed since it was opened: other content"):
        source.read([1])


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a\udcff.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(DataError, match=r"\*\.jsonl: the name of a file is not UTF-8; rename it"):
        open_path(tmp_path / "*.jsonl")


def test_records_in_any_order_over_many_files(tmp_path: Path) -> None:
    for name, numbers in (("b", range(3, 5)), ("a", range(3)), ("c", range(5, 6))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"n": n}) + "\n" for n in numbers))
    for other in (".ipynb_checkpoints/a.jsonl", "._a.jsonl", "_delta_log/0.json"):  # no data of the folder
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"\0")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        source = open_path(path)
        assert source.records == 6
        assert [record for record, _ in source.read([5, 0, 3])] == [{"n": 5}, {"n": 0}, {"n": 3}]
        assert source.where(4) == f"{tmp_path / 'b.jsonl'}, line 2"
    assert open_path(tmp_path, limit=4).records == 4


def test_text_is_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\nOne\ntwo\n\n\f\n  Three\n \nFour\n")
    assert all_records(open_path(path)) == [{"text": "One\ntwo"}, {"text": "  Three"}, {"text": "Four"}]


def test_the_cached_index_is_used_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n')
    open_path(path)
    (index,) = cache.rglob("*.int64")
    np.array([0, 5, 9, 0, 0]).tofile(index)
    assert open_path(path).records == 2
    path.write_text('{"n": 1}\n{"n": 2}\n{"n": 3}\n')
    assert all_records(open_path(path)) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_broken_or_forbidden_cache_only_costs_a_scan(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n')
    open_path(path)
    (index,) = cache.rglob("*.int64")
    index.write_bytes(b"garbage")
    assert all_records(open_path(path)) == [{"n": 1}]
    shutil.rmtree(index.parent)
    index.parent.write_text("a file where the folder should be")
    assert all_records(open_path(path)) == [{"n": 1}]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-home/.cache")  # where not even root can make a folder
    assert all_records(open_path(path)) == [{"n": 1}]


def test_without_locks_work_is_done_twice_and_never_half(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(_file: object, _operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    def write(file: IO[bytes]) -> None:
        file.write(b"whole")

    def overtaken(file: IO[bytes]) -> None:
        write(file)
        assert cached("kind", "identity", ".bin", write).read_bytes() == b"whole"

    assert cached("kind", "identity", ".bin", overtaken).read_bytes() == b"whole"
    assert {path.suffix for path in (cache / "dsft" / "kind").iterdir()} == {".bin", ".lock"}


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_empty_data_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no records in it"):
        open_path(path)


def test_missing_unknown_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        open_path(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="no file in this folder"):
        open_path(tmp_path)
    (tmp_path / "a.json").write_text("{}\n")
    (tmp_path / "README.md").write_text("What it is.\n")
    with pytest.raises(DataError, match=r"several formats \(\.json, \.md\); name those to be read"):
        open_path(tmp_path)
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(DataError, match="set `format`"):
        open_path(tmp_path / "a.xyz")
    source_path = tmp_path / "a.jsonl"
    source_path.write_text("{}\n{}\n")
    source = open_path(source_path)
    source_path.write_text("{}\n")  # the index is that of the longer file
    with pytest.raises(DataError, match=r"a\.jsonl has changed since it was opened: 3 bytes, 6 then"):
        source.read([0])
    source_path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read"):
        source.read([1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"n": 1}, {"n": 2}]', r"found a JSON array.*jq -c '\.\[\]' FILE"),
        ('[\n {"n": 1}\n]', r"found a JSON array.*jq -c '\.\[\]' FILE"),
        ('{\n "n": 1\n}', r"found an object spread over lines.*jq -c \. FILE"),
        ("n: 1", "not valid JSON: Expecting value"),
    ],
)
def test_json_that_is_no_jsonl_is_told_how_to_become_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    ((_, problem),) = open_path(path).read([0])
    assert re.search(message, problem or "")


def test_windows_are_bounded_by_documents_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"t": "x" * n}) + "\n" for n in (1, 1, 1, 500, 1, 1)))
    source = open_path(path)
    assert source.windows(2, 1 << 20).tolist() == [0, 2, 4, 6]
    assert source.windows(100, 60).tolist() == [0, 3, 4, 6]


def test_packing_fills_sequences() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 4096)
    bins = pack(lengths, 2048)
    assert sorted(item for members in bins for item in members) == list(range(4096))
    assert max(lengths[members].sum() for members in bins) <= 2048
    assert lengths.sum() / (len(bins) * 2048) > 0.99
    assert pack(np.array([5, 5, 5]), 10) == [[0, 1], [2]]
