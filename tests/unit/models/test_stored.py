"""Which tensors a base has, learned from headers: a hub is asked for nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

import tiny_models
from lorakit.models.empty import empty_classifier
from lorakit.models.stored import missing_parameters, tensor_names
from lorakit.models.task_head import ClassificationHead

SHA = "a" * 40


def bert() -> Any:
    """BERT for masked tokens, which has no pooler; half a megabyte of weights."""
    config = BertConfig(
        vocab_size=2000, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, pad_token_id=0,
    )  # fmt: skip
    return tiny_models.seeded(lambda: BertForMaskedLM(config))


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, owner/model."""

    directory: Path
    sent: dict[str, int]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        if self.path.startswith("/api/models/owner/model"):
            self._send(json.dumps(self._listing()).encode())
            return
        file = self.directory / self.path.rpartition("/")[2]
        if not file.is_file():
            self._send(b"", 404)
            return
        data, code = file.read_bytes(), 200
        asked = self.headers.get("range")
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            data, code = data[int(first) : int(last) + 1], 206
        if body:
            self.sent[file.name] = self.sent.get(file.name, 0) + len(data)
        self._send(data, code, body=body)

    def _listing(self) -> Any:
        files = sorted(self.directory.iterdir())
        if "/tree/" in self.path:
            return [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f.name)}
                for f in files
            ]
        return {"id": "owner/model", "sha": SHA, "siblings": [{"rfilename": f.name} for f in files]}

    def _send(self, data: bytes, code: int = 200, *, body: bool = True) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{_etag(self.path)}"')
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def _etag(name: str) -> str:
    return hashlib.sha1(name.rpartition("/")[2].encode()).hexdigest()


@contextmanager
def hub(directory: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """The address of a hub with this model, and the bytes sent of each file."""
    handler = type("Handler", (Hub,), {"directory": directory, "sent": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.sent
    finally:
        server.shutdown()
        server.server_close()


def asked_of_hub(url: str, cache: Path) -> list[str]:
    """The names, from a process whose hub is this one."""
    code = (
        "import json; from lorakit.models.stored import tensor_names; "
        "print(json.dumps(sorted(tensor_names('owner/model'))))"
    )
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_of_a_hub_only_the_header_is_read(shard: str, tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    weights = {f.name: f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors")}
    assert (len(weights) > 1) == (shard == "200KB")
    with hub(tmp_path / "base") as (url, sent):
        names = asked_of_hub(url, tmp_path / "cache")
    assert set(names) == tensor_names(tmp_path / "base")
    assert sum(sent.get(name, 0) for name in weights) < sum(weights.values()) / 2
    assert sum(sent.get(name, 0) for name in weights) <= 100_001 * (len(weights) == 1)


def test_what_a_classifier_lacks_is_seen_without_weights(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "base")
    head = ClassificationHead(names=("a", "b"), pad_token_id=0, seed=0)
    empty = empty_classifier(model.config, head)
    wanted = {n for n, _ in empty.named_parameters() if n.startswith(("classifier", "bert.pooler"))}
    assert set(missing_parameters(tmp_path / "base", empty)) == wanted


def test_a_cached_repository_of_which_only_the_index_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    snapshot = repository / "snapshots" / SHA
    bert().save_pretrained(snapshot, max_shard_size="200KB")
    names = tensor_names(snapshot)
    for file in snapshot.glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert tensor_names("owner/model") == names
