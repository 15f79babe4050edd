"""`dsft stage` against a server on this machine that speaks the hub's protocol, and what it refuses to stage."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import save_file

from trainer.config.loading import load_config
from trainer.failures import UserError
from trainer.stage import verify_model

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c" * 40


class _Hub(http.server.BaseHTTPRequestHandler):
    """`/api/models/ID/revision/main`, `/api/models/ID/tree/...`, `/ID/resolve/...`; other paths: files of `folder`."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, send_body: bool) -> None:
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            body = self._describe("/".join(parts[2:4]), parts[4:])
        else:
            if parts[2:3] == ["resolve"]:
                parts = [*parts[:2], *parts[4:]]
            path = self.folder.joinpath(*parts)
            body = path.read_bytes() if path.is_file() else None
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if parts[0] == "api" else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def _describe(self, name: str, what: list[str]) -> bytes | None:
        folder = self.folder / name
        if not folder.is_dir():
            return None
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if what[:1] == ["tree"]:
            tree = [
                {"type": "file", "oid": "0" * 40, "size": path.stat().st_size, "path": str(path.relative_to(folder))}
                for path in files
            ]
            return json.dumps(tree).encode()
        siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
        return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    _Hub.folder = tmp_path / "hub"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def make_hub(folder: Path) -> None:
    """A model in two files, its tokenizer in another repository, and records."""
    model, tokenizer = folder / "org" / "model", folder / "org" / "tokens"
    model.mkdir(parents=True)
    tokenizer.mkdir(parents=True)
    save_file({"a": np.zeros(4, np.float32)}, model / "one.safetensors")
    save_file({"b": np.zeros(4, np.float32)}, model / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 64}')
    (model / "pytorch_model.bin").write_bytes(b"the same again")
    records = [{"prompt": f"{a} plus {b} is ", "completion": f"{a + b}."} for a in range(9) for b in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    datasets.Dataset.from_list(records).to_json(folder / "rows" / "train.jsonl")
    lines = (record["prompt"] + record["completion"] for record in records)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(tokenizer / "tokenizer"), vocab_size=30, minloglevel=2
    )
    (tokenizer / "tokenizer.vocab").unlink()
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


def stage(folder: Path, hub: str, config: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(config))
    names = ("PATH", "HOME", "LANG", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "launcher", "stage", "config.json", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def described(hub: str, folder: Path) -> dict[str, Any]:
    return {
        "name": "staged",
        "task": {"type": "causal-lm"},
        "model": {"path": "org/model", "tokenizer": "org/tokens"},
        "data": {
            "train": [{"path": f"{hub}/train.jsonl"}, {"path": f"hf://{folder / 'hub' / 'rows'}"}],
            "evaluation": [{"path": f"file://{folder}/hub/*.jsonl", "limit": 5}],
            "sequence_length": 64,
        },
        "training": {"global_batch_size": 4, "max_steps": 2},
    }


def test_what_is_remote_is_copied_and_named_by_local_paths(tmp_path: Path, hub: str) -> None:
    make_hub(tmp_path / "hub")
    config = described(hub, tmp_path)
    done = stage(tmp_path, hub, config, "--output", "shared", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["copied"][:2] == ["org/model", "org/tokens"]
    assert len(found["copied"]) == 5
    shared = tmp_path / "shared"
    staged = load_config(Path(found["config"]))
    assert staged.model.path == str(shared / "models" / "org--model")
    assert staged.model.tokenizer == str(shared / "tokenizers" / "org--tokens")
    assert [source.path for source in staged.data.train] == [
        str(shared / "data" / "train-0" / "train.jsonl"),
        str(shared / "data" / "train-1"),
    ]
    assert staged.cluster.environment == {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    names = {path.name for path in Path(staged.model.path).iterdir() if path.is_file()}
    assert names == {"one.safetensors", "two.safetensors", "model.safetensors.index.json", "config.json"}


def test_what_cannot_be_had_is_named(tmp_path: Path, hub: str) -> None:
    make_hub(tmp_path / "hub")
    config = described(hub, tmp_path)
    config["model"]["path"] = "org/nosuchmodel"
    done = stage(tmp_path, hub, config)
    assert done.returncode == 2
    assert "error: model.path: org/nosuchmodel cannot be had from the hub" in done.stderr
    config = described(hub, tmp_path)
    config["data"]["train"][0]["path"] = f"{hub}/nosuchfile.jsonl"
    done = stage(tmp_path, hub, config)
    assert done.returncode == 2
    assert "nosuchfile.jsonl: there is no such file" in done.stderr


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    make_hub(tmp_path)
    model = tmp_path / "org" / "model"
    verify_model(model)
    whole = (model / "two.safetensors").read_bytes()
    (model / "two.safetensors").write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"two\.safetensors is not whole"):
        verify_model(model)
    (model / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks weights of two\.safetensors"):
        verify_model(model)
    (model / "two.safetensors").write_bytes(whole)
    (model / "config.json").write_text('{"auto_map": {"AutoModel": "org/elsewhere--modeling.Model"}}')
    with pytest.raises(UserError, match="lies in another repository"):
        verify_model(model)
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="there is no safetensors file"):
        verify_model(model)
