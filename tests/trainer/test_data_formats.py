"""Every format gives the same records, by number; damaged files are named, never read as something else."""

from __future__ import annotations

import csv
import gzip
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from trainer import retry
from trainer.config.schema import DataSource
from trainer.data.formats import columns
from trainer.data.sources import Source, open_source
from trainer.failures import DataError

ROWS = [{"q": f'question {n}, "quoted"\nand é', "a": f"answer\t{n}"} for n in range(2000)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    return tmp_path / "cache"


def open_path(path: Path | str, **more: Any) -> Source:
    return open_source(DataSource(path=str(path), **more))


def write(path: Path) -> Path:
    """ROWS in the format of the path's name."""
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    data = io.BytesIO()
    table = pyarrow.Table.from_pylist(ROWS)
    if plain.endswith(("csv", "tsv")):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["q", "a"], delimiter="\t" if plain.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        data.write(text.getvalue().encode())
    elif plain.endswith("jsonl"):
        data.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())
    elif plain.endswith("parquet"):
        parquet.write_table(table, data, row_group_size=300)
    elif plain.endswith("stream.arrow"):
        with pyarrow.ipc.new_stream(data, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    elif plain.endswith("lz4.arrow"):
        with pyarrow.ipc.new_stream(
            data, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="lz4")
        ) as writer:
            writer.write_table(table, max_chunksize=300)
    elif plain.endswith("arrow"):
        with pyarrow.ipc.new_file(data, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    content = data.getvalue()
    if path.suffix == ".gz":
        content = gzip.compress(content[:5000]) + gzip.compress(content[5000:])  # two members, as pigz writes
    if path.suffix == ".zst":
        content = bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.csv",
        "a.tsv",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.csv.gz",
        "a.parquet",
        "a.arrow",
        "a.stream.arrow",
        "a.lz4.arrow",
    ],
)
def test_any_format_any_order(tmp_path: Path, name: str) -> None:
    for _ in range(2):  # the second time from the cache
        source = open_path(write(tmp_path / name) if not (tmp_path / name).exists() else tmp_path / name)
        assert source.records == len(ROWS)
        numbers = [1999, 0, 700, 299, 300, 1]
        assert source.read(numbers) == [(ROWS[n], None) for n in numbers]
        windows = source.windows(128, 1 << 20)
        assert windows[0] == 0
        assert windows[-1] == len(ROWS)
        assert (windows[1:] - windows[:-1]).max() <= 128
        by_size = source.windows(10_000, source.files[0].size // 10)
        assert 9 <= len(by_size) - 1 <= 12


@pytest.mark.parametrize("name", ["a.parquet", "a.lz4.arrow"])
def test_large_batches_are_rewritten_in_small_ones(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_LARGEST_BATCH", 1000)
    monkeypatch.setattr(columns, "_ROWS", 7)
    source = open_path(write(tmp_path / name))
    assert [r for r, _ in source.read(range(2000))] == ROWS
    assert source.where(5) == f"{tmp_path / name}, row 6"
    (copy,) = (tmp_path / "cache").rglob("*.arrow")
    assert pyarrow.ipc.open_file(str(copy)).get_batch(0).num_rows == 7


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_categories_that_differ_from_batch_to_batch(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "_LARGEST_BATCH", 1)
    tables = [pyarrow.table({"label": pyarrow.array(of).dictionary_encode()}) for of in (["a"] * 500, ["b"] * 500)]
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    with (
        parquet.ParquetWriter(tmp_path / name, tables[0].schema)
        if name == "a.parquet"
        else pyarrow.ipc.new_stream(tmp_path / name, tables[0].schema, options=options)
    ) as writer:
        for table in tables:
            writer.write_table(table)
    assert [r for r, _ in open_path(tmp_path / name).read([0, 499, 500])] == [{"label": c} for c in "aab"]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow", "b.arrow"])
def test_a_column_that_comes_twice(tmp_path: Path, name: str) -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    with (tmp_path / name).open("wb") as file:
        if name == "a.csv":
            file.write(b"text,text\na,b\n")
        elif name == "a.parquet":
            parquet.write_table(table, file)
        else:
            new = pyarrow.ipc.new_file if name == "a.arrow" else pyarrow.ipc.new_stream
            with new(file, table.schema) as writer:
                writer.write_table(table)
    with pytest.raises(DataError, match="column 'text' comes twice"):
        open_path(tmp_path / name)


def test_csv_by_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbf"q",a\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n'
        b'3,4,5\r\n"open" x,6\r\n\xff,7\r\n8,"never closed\r\n9,9'
    )
    source = open_path(path)
    found = source.read(range(source.records))
    assert found[0] == ({"q": "1", "a": 'two\r\nlines, "quoted"'}, None)
    problems = [problem for _, problem in found[1:]]
    assert problems[0] == f"{path}, line 5: 3 fields, but 2 columns (q, a)"
    assert "line 6: not a row of fields as in RFC 4180" in str(problems[1])
    assert "line 7: not UTF-8 (byte 0xff)" in str(problems[2])
    assert "line 8: not a row of fields as in RFC 4180: unexpected end of data" in str(problems[3])
    (tmp_path / "c.csv").write_bytes(b'\xef\xbb\xbf"two\nlines",1\n')
    assert open_path(tmp_path / "c.csv", column_names=("q", "a")).read([0]) == [({"q": "two\nlines", "a": "1"}, None)]
    (tmp_path / "b.tsv").write_text('1\tsay "so"\n2\t"open\n')
    named = open_path(tmp_path / "b.tsv", column_names=("n", "text"), quoting=False)
    assert named.read([0, 1]) == [({"n": "1", "text": 'say "so"'}, None), ({"n": "2", "text": '"open'}, None)]
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbf\r\na,b\r\n1,2\r\n")
    assert open_path(tmp_path / "d.csv").read([0]) == [({"a": "1", "b": "2"}, None)]
    (tmp_path / "e.csv").write_bytes(b'a,b\n"1\n\r",2\nx\ry,2\n')
    with pytest.raises(DataError, match="line 4: a carriage return alone"):
        open_path(tmp_path / "e.csv")


def test_a_long_field_of_csv_is_read_by_whoever_finds_the_index_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    open_path(path)
    csv.field_size_limit(131_072)  # Python's own, as in a new process
    assert open_path(path).read([0]) == [({"text": "x" * 200_000}, None)]


def test_what_may_pass_is_tried_again_and_nothing_else() -> None:
    for error in (OSError(5, "Input/output error"), OSError(116, "Stale"), ConnectionError("reset"), TimeoutError()):
        assert retry.passing(error)
    for error in (OSError("Corrupt snappy compressed data."), OSError(2, "none"), PermissionError(), ValueError()):
        assert not retry.passing(error)


def test_damaged_arrow_is_not_read_beyond_its_end(tmp_path: Path) -> None:
    path, table = tmp_path / "a.arrow", pyarrow.table({"text": ["abc", "def"]})
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    offsets = np.array([0, 3, 6], dtype=np.int32).tobytes()
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(path.read_bytes().replace(offsets, np.array([0, 1 << 30, 6], dtype=np.int32).tobytes()))
    with pytest.raises(DataError, match=r"a\.arrow cannot be read: .*offset"):
        open_path(path).read([0, 1])


def test_a_time_beyond_all_dates_costs_its_row_alone(tmp_path: Path) -> None:
    times = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "time": times}), tmp_path / "a.parquet")
    (good, _), (bad, problem) = open_path(tmp_path / "a.parquet").read(range(2))
    assert good["text"] == "a"
    assert bad is None
    assert "row 2: date value out of range" in str(problem)


def test_text_that_is_not_utf_8_costs_its_row_alone(tmp_path: Path) -> None:
    _, offsets, data = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary()).buffers()
    table = pyarrow.table({"text": pyarrow.StringArray.from_buffers(3, offsets, data)})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second, third = open_path(tmp_path / "a.parquet").read(range(3))
    assert (first, third) == (({"text": "a"}, None), ({"text": "c"}, None))
    assert second[0] is None
    assert "row 2: not UTF-8" in str(second[1])


def test_parallel_files(tmp_path: Path) -> None:
    """Two files of text, one of them compressed, are pairs of lines; lines without a partner are an error."""
    (tmp_path / "a.en").write_text('one\n\nthree "3"\r\n', newline="")
    (tmp_path / "a.de.gz").write_bytes(gzip.compress("\ufeffeins\nzwei\ndrei\tund\u2028mehr".encode()))
    given = {"source_path": str(tmp_path / "a.en"), "target_path": str(tmp_path / "a.de.gz")}
    source = open_source(DataSource.model_validate({"format": "parallel", **given}))
    wanted = [("one", "eins"), ("", "zwei"), ('three "3"', "drei\tund\u2028mehr")]
    assert [record for record, _ in source.read([0, 1, 2])] == [{"source": a, "target": b} for a, b in wanted]
    (tmp_path / "a.en").write_text("one\n")
    with pytest.raises(DataError, match=r"a\.en ends after line 1, .*a\.de\.gz goes on"):
        open_source(DataSource.model_validate({"format": "parallel", **given}))
    for wrong in ({"format": "parallel", "path": "a"}, {"source_path": "a"}, {"format": "text", **given}):
        with pytest.raises(ValidationError, match="given together"):
            DataSource.model_validate(wrong)


def tar_file(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset(tmp_path: Path) -> None:
    long = "d/" + "x" * 150  # needs an extended header
    path = tar_file(
        tmp_path / "a.tar",
        {
            "d/1.txt": "é".encode(),
            "d/1.json": b'{"a": 1}',
            "d/._1.txt": b"\0",  # no records: what macOS leaves beside a file, and what has no extension
            "d/README": b"about",
            "d/2.seg.txt": b"two",
            "d/2.png": b"\x89",
            f"{long}.txt": b"3",
            "d/4.json": b"[1]",
        },
    )
    source = open_path(path)
    assert source.records == 4
    assert source.read([2, 0, 1])[0] == ({"__key__": long, "txt": "3"}, None)
    assert source.read([0]) == [({"__key__": "d/1", "txt": "é", "json.a": 1}, None)]
    assert source.read([1]) == [({"__key__": "d/2", "seg.txt": "two", "png": b"\x89"}, None)]
    assert "record 4: expected a JSON object" in str(source.read([3])[0][1])
    compressed = tmp_path / "b.tar.gz"
    compressed.write_bytes(gzip.compress(path.read_bytes()))
    assert open_path(compressed).read([2]) == source.read([2])
    whole = path.read_bytes()
    for size in (1300, 600):  # within a header, within a member's content
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="unexpected end of data"):
            open_path(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl.gz", "cut short"),
        ("a.jsonl.zst", "cut short"),
        ("a.parquet", "no parquet file"),
        ("a.arrow", "no arrow file"),
    ],
)
def test_a_truncated_file(tmp_path: Path, name: str, message: str) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{name}.* {message}"):
        open_path(path)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_damaged_gzip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz")
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        open_path(path)


def test_datasets_on_disk_and_by_load_dataset(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    made.select(range(500, 1500)).save_to_disk(str(tmp_path / "one"))
    one = open_path(tmp_path / "one")
    assert one.read([999, 3]) == [(ROWS[1499], None), (ROWS[503], None)]
    datasets.DatasetDict(train=made, test=made.select([7])).save_to_disk(str(tmp_path / "two"))
    assert open_path(tmp_path / "two").records == 2000
    assert open_path(tmp_path / "two", split="test").read([0]) == [(ROWS[7], None)]
    with pytest.raises(DataError, match="set `split` to one of train, test"):
        open_path(tmp_path / "two", split="dev")
    (tmp_path / "three").mkdir()
    write(tmp_path / "three" / "train.parquet")
    loaded = open_path(f"hf://{tmp_path / 'three'}")  # what load_dataset takes for an id may be a folder
    assert loaded.read([1999]) == [(ROWS[1999], None)]
    assert one.fingerprint() != loaded.fingerprint()


class _Server(http.server.BaseHTTPRequestHandler):
    content = b""
    failures = 0
    requests = 0

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(self.content)

    def _answer(self, body: bytes) -> None:
        _Server.requests += 1
        if self.path != "/a.jsonl":
            self.send_error(403 if self.path == "/c.jsonl" else 404)
        elif _Server.failures > 0:
            _Server.failures -= 1
            self.send_error(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_that_fails_twice_is_fetched_once(tmp_path: Path, url: str) -> None:
    _Server.content, _Server.failures = write(tmp_path / "a.jsonl").read_bytes(), 2
    source = open_path(f"{url}/a.jsonl")
    assert _Server.failures == 0
    assert [record for record, _ in source.read(range(2000))] == ROWS
    assert source.where(1) == f"{url}/a.jsonl, line 2"
    before = _Server.requests
    open_path(f"{url}/a.jsonl")
    assert _Server.requests - before == 1  # whether it has changed
    with pytest.raises(DataError, match=r"b\.jsonl: there is no such file"):
        open_path(f"{url}/b.jsonl")
    with pytest.raises(DataError, match=r"c\.jsonl cannot be read: 403"):
        open_path(f"{url}/c.jsonl")
    _Server.failures = 1000
    with pytest.raises(DataError, match="cannot be read: 503"):
        open_path(f"{url}/a.jsonl")
    assert _Server.failures > 980


def test_globs_and_folders_of_other_file_systems(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("b.csv", "a.csv"):
        write(folder / name)
    source = open_path(f"file://{folder}/*.csv")
    assert source.records == open_path(f"file://{folder}").records == 4000
    assert source.where(0) == f"file://{folder}/a.csv, line 2"
    with pytest.raises(DataError, match="no such file"):
        open_path(f"file://{folder}/*.tar")
    (folder / "README.md").write_text("About\n")  # is no data
    with pytest.raises(DataError, match=r"several formats \(\.csv, \.md\); name those"):
        open_path(f"file://{folder}")


def test_plain_files_import_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    program = (
        "import sys; from trainer.config.schema import DataSource; from trainer.data.sources import open_source;"
        f"open_source(DataSource(path={str(path)!r})).read([0]);"
        "print(sorted({'pyarrow', 'datasets', 'fsspec', 'torch', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
