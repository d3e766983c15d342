"""Health, metrics and the page's data."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import tiny_server
from lorakit.errors import ServeError
from lorakit.serve import monitor
from lorakit.serve.service import Service

WEB = Path(monitor.__file__).parent / "web"


def get(service: Service, path: str) -> httpx.Response:
    async def once() -> httpx.Response:
        async with tiny_server.asking(service) as client:
            return await client.get(path)

    return asyncio.run(once())


def ask_head(service: Service, path: str) -> httpx.Response:
    async def once() -> httpx.Response:
        async with tiny_server.asking(service) as client:
            return await client.head(path)

    return asyncio.run(once())


def post(service: Service, path: str, **body: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with tiny_server.asking(service) as client:
            return await client.post(path, json=body)

    return asyncio.run(once())


def samples(service: Service) -> dict[tuple[str, str], float]:
    """(name, labels) -> value."""
    response = get(service, "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_health_follows_the_drain(service: Service) -> None:
    fresh = Service(service.engine, service.prompts, options=service.options)
    assert get(fresh, "/health").json() == {"status": "ok"}
    assert ask_head(fresh, "/health").status_code == 200
    fresh.draining = True
    assert get(fresh, "/health").status_code == 503
    late = post(fresh, "/v1/completions", model="tiny", prompt="a")
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in late.headers


def test_health_says_that_the_engine_has_failed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.engine, "failure", ServeError("broken", found="a defect"))
    response = get(service, "/health")
    assert (response.status_code, response.json()) == (503, {"status": "failed"})
    late = post(service, "/v1/completions", model="tiny", prompt="a")
    assert late.status_code == 500
    assert "a defect" in late.json()["error"]["message"]


def test_metrics_count_what_was_done(service: Service) -> None:
    fresh = Service(service.engine, service.prompts, options=service.options)
    body = {"model": "sql", "prompt": "abc", "max_tokens": 5, "ignore_eos": True}
    assert post(fresh, "/v1/completions", **body).status_code == 200
    assert post(fresh, "/v1/completions", model="nobody", prompt="a").status_code == 404
    for weight in (0.25, 0.5):
        summed = {"model": "tiny", "adapters": {"sql": weight}, "prompt": "a", "max_tokens": 2}
        assert post(fresh, "/v1/completions", **summed, ignore_eos=True).status_code == 200
    assert get(fresh, "/made/up/path").status_code == 404
    found = samples(fresh)
    assert found["lorakit_requests_total", "adapter=sql,outcome=length"] == 1
    assert found["lorakit_tokens_total", "adapter=sql,kind=generated"] == 5
    assert found["lorakit_tokens_total", "adapter=sql,kind=prompt"] == 3
    # What a client makes up is never a label: its weights neither.
    assert found["lorakit_requests_total", "adapter=(composed),outcome=length"] == 2
    assert not any("*" in labels for _, labels in found)
    assert found["lorakit_time_to_first_token_seconds_count", ""] == 3
    assert found["lorakit_time_per_output_token_seconds_count", ""] == 3
    assert found["lorakit_http_responses_total", "path=/v1/completions,status=200"] == 3
    assert found["lorakit_http_responses_total", "path=/v1/completions,status=404"] == 1
    assert found["lorakit_http_responses_total", "path=other,status=404"] == 1
    assert found["lorakit_requests_running", ""] == 0
    assert found["vllm:num_requests_waiting", ""] == 0
    (info,) = [labels for name, labels in found if name == "vllm:lora_requests_info"]
    assert info == "max_lora=4,running_lora_adapters=,waiting_lora_adapters="


def test_running_adapters_are_in_vllm_s_gauge(service: Service) -> None:
    async def during() -> str:
        async with tiny_server.asking(service) as client:
            body = {"model": "sql", "prompt": "a", "max_tokens": 100, "ignore_eos": True}
            answers = [asyncio.create_task(client.post("/v1/completions", json=body))]
            for _ in range(200):
                text = (await client.get("/metrics")).text
                if 'running_lora_adapters="sql"' in text:
                    break
            await asyncio.gather(*answers)
            return text

    line = re.search(r"^vllm:lora_requests_info\{(.*)\} [0-9.e+]+$", asyncio.run(during()), re.M)
    assert line is not None
    assert 'running_lora_adapters="sql"' in line[1]


def test_the_page_s_data(service: Service) -> None:
    listed = get(service, "/lorakit/adapters").json()
    by_name = {adapter["name"]: adapter for adapter in listed["adapters"]}
    assert listed["base"] == "tiny"
    assert by_name["sql"]["r"] == 4
    assert by_name["sql"]["alpha"] == 12
    assert by_name["sql"]["num_params"] > by_name["chat"]["num_params"] > 0
    one = get(service, "/lorakit/adapters/sql").json()
    assert one["passport"]["metrics"] == {"loss": 0.25}
    assert "sites" not in one["passport"]
    stats = get(service, "/lorakit/stats").json()
    assert {"running", "waiting", "tokens_per_s", "adapters_ram"} <= set(stats)


@pytest.mark.parametrize("path", sorted(monitor.PAGE))
def test_the_page_needs_nothing_from_elsewhere(service: Service, path: str) -> None:
    response = get(service, path)
    assert response.status_code == 200
    assert "default-src 'self'" in response.headers["content-security-policy"]
    outside = re.findall(r"""(?:https?:)?//[^\s"'<>]+\.[^\s"'<>]+""", response.text)
    assert [link for link in outside if "www.w3.org" not in link] == []


def test_every_file_of_the_page_is_served() -> None:
    assert {file.name for file in WEB.iterdir()} == {name for name, _ in monitor.PAGE.values()}
