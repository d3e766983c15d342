"""`lorakit serve` as a stranger meets it: a process, curl, SIGTERM; and the real model once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_server
from lorakit.cli.main import main
from lorakit.serve.start import ServeSettings, started


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_server.write_base(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_server.write_adapters(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def process(base: Path, adapters: Path) -> Iterator[subprocess.Popen[str]]:
    """A server of its own, asked to say in JSON where it listens."""
    words = ["serve", "--model", base, "--adapters", adapters, "--name", "tiny", "--port", 0]
    # One request at a time, so that a few of them take a while.
    words += ["--max-batch", 1, "--drain-timeout", 200, "--json"]
    keys = {"LORAKIT_API_KEY": "s3cret", "LORAKIT_ADMIN_KEY": "root"}
    running = subprocess.Popen(
        [sys.executable, "-m", "lorakit.cli.main", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **keys},
    )
    yield running
    if running.poll() is None:
        running.kill()
    running.communicate()


def read_ready(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object that says that it answers."""
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line == "}\n":
            return json.loads(text)
    raise AssertionError(process.communicate()[1])


def curl(url: str, *words: str, key: str = "s3cret") -> str:
    """What a stranger types."""
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "60", "-H", f"Authorization: Bearer {key}", *words, url],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_start_ask_with_curl_and_stop_in_order(process: subprocess.Popen[str]) -> None:
    ready = read_ready(process)
    url = ready["url"]
    assert ready["model"] == "tiny"
    assert {"sql", "chat"} <= set(ready["adapters"])
    assert curl(f"{url}/health", key="") == '{"status":"ok"}'
    assert json.loads(curl(f"{url}/v1/models", key="wrong"))["error"]["code"] == "invalid_api_key"
    assert "sql" in [model["id"] for model in json.loads(curl(f"{url}/v1/models"))["data"]]
    as_json = ("-H", "Content-Type: application/json", "-d")
    body = {"model": "sql", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    answer = json.loads(curl(f"{url}/v1/chat/completions", *as_json, json.dumps(body)))
    assert answer["usage"]["completion_tokens"] >= 1
    load = json.dumps({"lora_name": "sql-v2", "lora_path": "sql"})
    assert "Success" in curl(f"{url}/v1/load_lora_adapter", *as_json, load, key="root")

    # Headers without an end are refused, whichever parsers are installed beside ours.
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + 200_000 * b"a")
        assert line.recv(100).startswith(b"HTTP/1.1 400")

    # Six answers, one after the other: the signal comes in the middle.
    long = {"model": "sql-v2", "prompt": "a", "max_tokens": 60, "n": 6, "ignore_eos": True}
    asked = json.dumps({**long, "stream": True})
    words = ["curl", "-sSN", "-H", "Authorization: Bearer s3cret", *as_json, asked]
    with subprocess.Popen(
        [*words, f"{url}/v1/completions"], stdout=subprocess.PIPE, text=True
    ) as streaming:
        assert streaming.stdout is not None
        first = streaming.stdout.readline()
        assert first.startswith("data: ")
        process.send_signal(signal.SIGTERM)
        rest = streaming.stdout.read()
    assert streaming.returncode == 0
    ends = [chunk["choices"][0]["finish_reason"] for chunk in tiny_server.events(first + rest)]
    assert ends.count("length") == 6

    errors = process.communicate(timeout=200)[1]
    assert process.returncode == 0, errors
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [401, 200, 200, 200, 200]
    assert requests[2]["adapter"] == "sql"
    assert lines[-1] == {**lines[-1], "event": "stopped", "cut_off": 0}
    assert "s3cret" not in errors


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--host", "0.0.0.0"], "everybody"),
        (["--adapters", "nowhere"], "directory of adapters"),
        (["--max-queue", "0"], "--max-queue"),
        (["--port", "70000"], "--port"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
        (["--api-key", "k", "--admin-key", "k"], "the same"),
        (["--pin", "sql"], "--pin"),
        (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen"),
    ],
)
def test_wrong_requests_are_exit_code_2_before_anything_is_loaded(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAKIT_API_KEY", raising=False)
    assert main(["serve", "--model", "not-a-model", *words]) == 2
    assert what in capsys.readouterr().err


def test_a_taken_port_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "not-a-model", "--port", str(port)]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_a_pinned_adapter_that_is_broken_stops_the_start(
    base: Path, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    words = ["serve", "--model", base, "--adapters", adapters, "--pin", "broken", "--port", "0"]
    assert main([str(word) for word in words]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert threading.active_count() <= before + 1


@pytest.mark.real
def test_the_real_model_answers(smollm2) -> None:
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": "base", "messages": question, "temperature": 0, "max_tokens": 12}
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}

    async def ask(service) -> tuple[dict[str, Any], dict[str, Any]]:
        async with tiny_server.asking(service) as client:
            path = "/v1/chat/completions"
            free = client.post(path, json=body)
            bound = client.post(path, json={**body, "response_format": form, "max_tokens": 24})
            answers = await asyncio.gather(free, bound)
            return answers[0].json(), answers[1].json()

    with started(model, tokenizer, ServeSettings(model="smollm2-135m-instruct")) as service:
        free, bound = asyncio.run(ask(service))
    assert free["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert free["choices"][0]["finish_reason"] == "stop"
    assert set(json.loads(bound["choices"][0]["message"]["content"])) == {"city"}
