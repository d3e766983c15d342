"""Ray Serve over our own engine on one machine, from its deployment file, as a stranger asks."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import APIStatusError, OpenAI

import tiny_server

pytestmark = pytest.mark.slow

RUN = """
import signal
import sys
import ray
from ray import serve
from lorakit.serve.ray_app import app

model, adapters, port = sys.argv[1:]
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=True)


def patiently(do):
    # Ray waits 60 s for its proxy process, which is not long where others compute too.
    for _ in range(9):
        try:
            return do()
        except TimeoutError as error:
            print(error, flush=True)
    return do()


patiently(lambda: serve.start(http_options={"host": "127.0.0.1", "port": int(port)}))
# What `serve run lorakit.serve.ray_app:app model=... adapters=...` hands over: words.
words = {"model": model, "adapters": adapters, "name": "tiny", "max_batch": "4"}
patiently(lambda: serve.run(app(words)))
try:
    signal.pause()
finally:
    serve.shutdown()
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("pip install 'lorakit[ray]'")
    directory = tmp_path_factory.mktemp("ray")
    base = tiny_server.write_base(directory / "tiny")
    adapters = tiny_server.write_adapters(base, directory / "adapters")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "1"}
    with (directory / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-c", RUN, str(base), str(adapters), str(port)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address, running, directory / "log")
            yield address
        finally:
            running.send_signal(signal.SIGINT)
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()


def _wait(address: str, running: subprocess.Popen[bytes], log: Path) -> None:
    # Ray starts ten Python processes before the first of ours: minutes where others compute too.
    end = time.monotonic() + 800
    while time.monotonic() < end:
        assert running.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def test_the_replica_answers_as_lorakit_serve_does(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    assert {"tiny", "sql", "chat"} <= {card.id for card in client.models.list()}
    asked = {"messages": [{"role": "user", "content": "How many?"}], "temperature": 0}
    said = {
        name: client.chat.completions.create(model=name, max_tokens=12, **asked)  # type: ignore[call-overload]
        .choices[0]
        .message.content
        for name in ("tiny", "sql", "tiny:chat")
    }
    assert len(set(said.values())) == 3
    stream = client.chat.completions.create(model="sql", max_tokens=12, stream=True, **asked)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == said["sql"]
    assert len(pieces) > 3
    with pytest.raises(APIStatusError) as refused:
        client.chat.completions.create(model="broken", max_tokens=4, **asked)  # type: ignore[call-overload]
    assert refused.value.status_code == 400
    with pytest.raises(APIStatusError) as missing:
        client.chat.completions.create(model="nobody", max_tokens=4, **asked)  # type: ignore[call-overload]
    assert missing.value.status_code == 404
    assert "lora_requests_info" in httpx.get(f"{url}/metrics").text
    other = httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"})
    assert other.status_code == 421
