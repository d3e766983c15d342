"""The server on a real socket: the openai client, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import httpx
import openai
import pytest

import tiny_server
from lorakit.serve.service import Service

TURNS = [{"role": "user", "content": "How many?"}]
LONG = {"model": "sql", "prompt": "a", "max_tokens": 100, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert {"tiny", "sql", "chat"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("sql").owned_by == "lorakit"


def test_sync_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="sql", messages=TURNS, max_tokens=10, temperature=0, logprobs=True, top_logprobs=2
    )
    text = whole.choices[0].message.content
    assert text
    assert whole.usage is not None
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="sql",
        messages=TURNS,
        max_tokens=10,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage


def test_the_client_s_own_stream_helper(client: openai.OpenAI) -> None:
    body = {"model": "chat", "messages": TURNS, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**body).choices[0].message.content or ""
    # The helper calls an answer that was cut at the limit an error: this one ends by itself.
    stop = next(character for character in whole[3:] if character.isascii())
    with client.chat.completions.stream(**body, stop=stop) as stream:
        seen = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(seen) == final.choices[0].message.content == whole[: whole.index(stop)]


def test_completions_and_extras(client: openai.OpenAI) -> None:
    body = {"prompt": "ab", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(model="chat", **body)
    weighed = client.completions.create(
        model="tiny", extra_body={"adapters": {"chat": 1.0}, "top_k": 3}, **body
    )
    assert one.choices[0].text == weighed.choices[0].text
    streamed = client.completions.create(model="chat", stream=True, **body)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one.choices[0].text


def test_errors_are_the_client_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        client.chat.completions.create(model="nobody", messages=TURNS)
    with pytest.raises(openai.BadRequestError, match="temprature") as caught:
        client.completions.create(model="tiny", prompt="a", extra_body={"temprature": 1})
    assert caught.value.code == "unknown_parameter"
    with pytest.raises(openai.BadRequestError, match=r"corrupt|truncated"):
        client.completions.create(model="broken", prompt="a")


def test_async_requests_of_several_adapters_at_once(url: str) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def one(model: str, stream: bool) -> str:
                body = {"model": model, "messages": TURNS, "max_tokens": 10, "temperature": 0}
                if not stream:
                    answer = await client.chat.completions.create(**body)
                    return answer.choices[0].message.content or ""
                parts = await client.chat.completions.create(**body, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in parts])

            names = ["tiny", "sql", "chat"]
            return await asyncio.gather(*(one(n, s) for s in (False, True) for n in names))

    answers = asyncio.run(all_of_them())
    assert answers[:3] == answers[3:]
    assert len(set(answers[:3])) == 3


def wait_for(what: Callable[[], bool]) -> None:
    """Until it is so; the engine needs a step to notice."""
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_cancels_its_request(
    service: Service, url: str, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    cancelled: list[str] = []
    cancel = service.engine.cancel
    monkeypatch.setattr(
        service.engine, "cancel", lambda number: (cancelled.append(number), cancel(number))
    )
    before = service.engine.stats().num_generated_tokens
    with httpx.Client(base_url=url, timeout=30) as client:
        body = {**LONG, "stream": stream, "n": 4}
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.02))
    wait_for(lambda: len(cancelled) >= 4 and service.engine.stats().running == 0)
    # Four answers of 100 tokens were asked for: they were not written to their end.
    assert service.engine.stats().num_generated_tokens - before < 400


def test_answers_that_are_cut_off_say_so(service: Service, url: str) -> None:
    fresh = Service(service.engine, service.prompts, options=service.options)
    body = {**LONG, "stream": True, "n": 4}
    with (
        tiny_server.serving(fresh) as address,
        httpx.Client(base_url=address, timeout=30) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        first = next(lines)
        fresh.cut_off()
        text = "\n".join([first, *lines])
    chunks = tiny_server.events(text + "\n")
    errors = [chunk["error"] for chunk in chunks if "error" in chunk]
    assert fresh.num_cut_off == len(errors) >= 1
    assert {error["code"] for error in errors} == {"aborted"}


def test_a_stream_is_sent_as_it_is_made(url: str) -> None:
    with (
        httpx.Client(base_url=url, timeout=30) as client,
        client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response,
    ):
        assert response.headers["x-accel-buffering"] == "no"
        assert "content-length" not in response.headers
        chunks = [line for line in response.iter_lines() if line]
    assert chunks[-1] == "data: [DONE]"
    first = json.loads(chunks[0].removeprefix("data: "))
    assert first["object"] == "text_completion"
    assert len(chunks) > 20
