"""OpenAI's routes over a tiny real model, asked in-process."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

import tiny_server
from lorakit.serve.request import FinishedEvent, GenerateRequest, OnEvent, SamplingOptions
from lorakit.serve.service import Service
from lorakit.serve.streams import Answers

TURNS = [{"role": "user", "content": "How many?"}]
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def ask(service: Service, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
    async def once() -> httpx.Response:
        async with tiny_server.asking(service) as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(once())


def chat(service: Service, **body: Any) -> dict[str, Any]:
    given = {"model": "tiny", "messages": TURNS, "max_tokens": 12, "temperature": 0, **body}
    response = ask(service, CHAT, given)
    assert response.status_code == 200, response.text
    return response.json()


def refused(service: Service, path: str = CHAT, **body: Any) -> tuple[int, dict[str, Any]]:
    given = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    given |= {"messages": TURNS} if path == CHAT else {"prompt": "a"}
    response = ask(service, path, {**given, **body})
    return response.status_code, response.json()["error"]


def said(answer: Mapping[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def test_models_are_the_base_and_the_adapters(service: Service) -> None:
    listed = ask(service, "/v1/models").json()
    cards = {card["id"]: card for card in listed["data"]}
    assert listed["object"] == "list"
    assert next(iter(cards)) == "tiny"
    assert {"tiny", "sql", "chat"} <= set(cards)
    assert cards["sql"]["parent"] == "tiny"
    assert cards["tiny"]["parent"] is None
    assert cards["tiny"]["max_model_len"] == tiny_server.CONTEXT
    assert ask(service, "/v1/models/sql").json() == cards["sql"]
    assert ask(service, "/v1/models/nobody").status_code == 404


def test_a_chat_answer_has_openai_s_shape(service: Service) -> None:
    answer = chat(service, model="sql")
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "sql"
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 12


def test_base_and_adapters_answer_differently_by_any_of_their_names(service: Service) -> None:
    base, sql = said(chat(service)), said(chat(service, model="sql"))
    assert base != sql
    assert sql != said(chat(service, model="chat"))
    assert sql == said(chat(service, model="tiny:sql")) == said(chat(service, model="base:sql"))
    assert base == said(chat(service, model="base"))


def test_the_system_turn_of_training_goes_before_turns_that_have_none(service: Service) -> None:
    plain, given = chat(service, model="chat"), chat(service, model="sql")
    extra = len(tiny_server.SYSTEM) + 2  # a token per byte, <system> and </s>
    assert given["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + extra
    own = [{"role": "system", "content": "x"}, *TURNS]
    with_own = chat(service, model="sql", messages=own)
    assert with_own["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + 3


def test_the_stream_says_what_the_whole_answer_says(service: Service) -> None:
    whole = chat(service, model="sql", logprobs=True, top_logprobs=2)
    body = {"model": "sql", "messages": TURNS, "max_tokens": 12, "temperature": 0, "stream": True}
    body |= {"logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}}
    response = ask(service, CHAT, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks: list[dict[str, Any]] = tiny_server.events(response.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == said(whole)
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    streamed = [
        token["token"]
        for chunk in chunks[:-1]
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == [t["token"] for t in whole["choices"][0]["logprobs"]["content"]]


def test_logprobs_are_of_the_chosen_token_and_the_best_ones(service: Service) -> None:
    answer = chat(service, model="sql", logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for token in content:
        best = token["top_logprobs"]
        assert len(best) == 3
        assert [t["logprob"] for t in best] == sorted((t["logprob"] for t in best), reverse=True)
        # Temperature 0: the chosen token is the best one.
        assert math.isclose(token["logprob"], best[0]["logprob"], abs_tol=1e-5)
        # One token per byte: half a character has U+FFFD as its text, and its own byte.
        half = "\ufffd" in token["token"]
        assert half or token["bytes"] == list(token["token"].encode())
        assert len(token["bytes"]) == 1 or not half
    assert chat(service, model="sql")["choices"][0]["logprobs"] is None


def test_completions_take_texts_and_token_ids(service: Service) -> None:
    body = {"model": "chat", "max_tokens": 6, "temperature": 0, "logprobs": 1}
    answer = ask(service, TEXT, {**body, "prompt": ["ab", "cd"], "n": 2}).json()
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert answer["usage"]["prompt_tokens"] == 4
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 6
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    ids = [6, 7]  # "ab": the letters follow the six special tokens
    same = ask(service, TEXT, {**body, "prompt": ids}).json()
    assert same["choices"][0]["text"] == texts[0]
    assert ask(service, TEXT, {**body, "prompt": [ids]}).json()["choices"] == same["choices"]


def test_a_seed_repeats_and_choices_differ(service: Service) -> None:
    body = {"temperature": 1.5, "seed": 5, "n": 3, "max_tokens": 20}
    first, again = chat(service, **body), chat(service, **body)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_answer_in_front_of_it(service: Service) -> None:
    whole = said(chat(service, max_tokens=30))
    stop = next(character for character in whole[3:] if character.isascii())
    answer = chat(service, max_tokens=30, stop=[stop])
    assert said(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    # vLLM's key: which of them it was.
    assert answer["choices"][0]["stop_reason"] == stop
    assert chat(service, max_tokens=2)["choices"][0]["stop_reason"] is None
    body = {"model": "tiny", "messages": TURNS, "max_tokens": 30, "temperature": 0, "stop": stop}
    chunks: list[dict[str, Any]] = tiny_server.events(
        ask(service, CHAT, {**body, "stream": True}).text
    )
    assert chunks[-1]["choices"][0]["stop_reason"] == stop


def test_a_bias_and_a_penalty_change_the_answer(service: Service) -> None:
    letter = 6 + 2  # "c": the letters follow the six special tokens
    assert said(chat(service, logit_bias={str(letter): 100})) == "c" * 12
    ended = chat(service, logit_bias={str(letter): 100}, stop_token_ids=[letter])
    assert (said(ended), ended["choices"][0]["finish_reason"]) == ("", "stop")
    long = {"max_tokens": 60, "ignore_eos": True}
    varied = said(chat(service, frequency_penalty=2.0, logit_bias={str(letter): 12}, **long))
    assert 1 < varied.count("c") < 60
    for option in ({"presence_penalty": 2.0}, {"repetition_penalty": 9.0}):
        # A token of the answer before loses to others once it is there.
        assert said(chat(service, **long, **option)) != said(chat(service, **long))


def test_completions_name_the_chosen_token_among_the_best(service: Service) -> None:
    body = {"model": "sql", "prompt": "ab", "max_tokens": 60, "logprobs": 1, "seed": 2}
    (choice,) = ask(service, TEXT, {**body, "ignore_eos": True}).json()["choices"]
    logprobs = choice["logprobs"]
    found = zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    )
    sizes = set()
    for token, logprob, best in found:
        assert best[token] == pytest.approx(logprob)
        sizes.add(len(best))
    # OpenAI: up to one more than asked for, where the chosen one is not among the best.
    assert sizes == {1, 2}


def test_json_answers_follow_their_schema(service: Service) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = chat(service, model="sql", max_tokens=100, response_format=form)
    value = json.loads(said(answer))
    assert set(value) == {"ok", "n"}
    assert value["n"] in (1, 2, 3)


def test_adapters_can_be_weighed_per_request(service: Service) -> None:
    both = said(chat(service, adapters={"sql": 0.5, "chat": 0.5}))
    alone = said(chat(service, adapters={"chat": 1.0}))
    assert alone == said(chat(service, model="chat"))
    assert both not in (alone, said(chat(service)))
    status, error = refused(service, model="sql", adapters={"chat": 1.0})
    assert (status, error["param"]) == (400, "adapters")


def test_names_that_are_not_served_are_404(service: Service) -> None:
    for stream in (False, True):
        status, error = refused(service, model="nobody", stream=stream)
        assert (status, error["code"]) == (404, "model_not_found")
    status, error = refused(service, adapters={"nobody": 1.0})
    assert status == 404
    # Longer than a disk has names, or a path.
    for name in (5000 * "a", "base:" + 300 * "b", "a/" * 3000):
        status, error = refused(service, model=name)
        assert (status, error["code"]) == (404, "model_not_found")
        assert len(error["message"]) < 400
    _, error = refused(service, model="sqll")
    assert "near it: sql" in error["message"]
    assert error["message"].count("GET /v1/models") == 1


def test_a_broken_adapter_is_refused_with_the_reason_and_the_others_go_on(service: Service) -> None:
    for stream in (False, True):
        status, error = refused(service, model="broken", stream=stream)
        assert status == 400, error
        assert "corrupt" in error["message"] or "truncated" in error["message"]
        assert str(service.options.adapters_dir) not in error["message"]
    assert said(chat(service, model="sql"))


BAD: list[tuple[str, dict[str, Any], str | None]] = [
    ("unknown key", {"temprature": 1}, "temprature"),
    ("NaN", {"temperature": "NaN"}, "temperature"),
    ("too hot", {"temperature": 3}, "temperature"),
    ("no tokens", {"max_tokens": 0}, "max_tokens"),
    ("more than the server gives", {"max_tokens": 101}, "max_tokens"),
    ("more than the context", {"max_tokens": 250}, "max_tokens"),
    ("no turns", {"messages": []}, "messages"),
    ("a picture", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    ("an unknown role", {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    (
        "a picture",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
    ),
    ("the assistant last", {"messages": [{"role": "assistant", "content": "a"}]}, None),
    ("many choices", {"n": 1000}, "n"),
    ("an empty stop", {"stop": [""]}, "stop"),
    ("tools", {"tools": [{"type": "function"}]}, None),
    ("too high a penalty", {"frequency_penalty": 2.5}, "frequency_penalty"),
    ("a penalty of none", {"repetition_penalty": 0}, "repetition_penalty"),
    ("a penalty that makes logits infinite", {"repetition_penalty": 5e-324}, "repetition_penalty"),
    ("a bias on a word", {"logit_bias": {"a": 1}}, "logit_bias"),
    ("too large a bias", {"logit_bias": {"5": 101}}, "logit_bias"),
    ("a bias on no token", {"logit_bias": {"100000": 1}}, None),
    ("alternatives alone", {"top_logprobs": 2}, None),
    ("usage without a stream", {"stream_options": {"include_usage": True}}, None),
    ("a schema without its type", {"response_format": {"type": "json_schema"}}, None),
]


@pytest.mark.parametrize(("body", "param"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_cannot_be_is_refused_in_openai_s_shape(
    service: Service, body: dict[str, Any], param: str | None
) -> None:
    status, error = refused(service, **body)
    assert status == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"].startswith(param)


def test_a_part_that_is_no_text_is_named(service: Service) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "b"}}]
    _, error = refused(service, messages=[{"role": "user", "content": parts}])
    assert "image_url" in error["message"]


@pytest.mark.parametrize("prompt", ["", [], ["a", ""], [[1, 10_000]], [-1], ["a"] * 65, 7])
def test_prompts_that_cannot_be_are_refused(service: Service, prompt: object) -> None:
    assert refused(service, TEXT, prompt=prompt)[0] == 400


def test_more_answers_than_may_ever_wait_are_refused_for_good(service: Service) -> None:
    status, error = refused(service, TEXT, prompt=["a", "b", "c"], n=3)
    assert (status, error["param"]) == (400, "n")


def test_a_prompt_beyond_the_context_is_refused(service: Service) -> None:
    status, error = refused(service, TEXT, prompt="a" * tiny_server.CONTEXT)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    left = chat(service, max_tokens=None, ignore_eos=True)
    assert left["usage"]["completion_tokens"] == 100


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b'{"model": "tiny", "prompt": "\\ud800"}', b"[" * 100_000, b"\xff\xfe"],
    ids=["empty", "cut", "a list", "half a character", "deep", "no unicode"],
)
def test_bodies_that_are_no_request_are_400(service: Service, data: bytes) -> None:
    async def once() -> httpx.Response:
        async with tiny_server.asking(service) as client:
            headers = {"content-type": "application/json"}
            return await client.post(TEXT, content=data, headers=headers)

    response = asyncio.run(once())
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_paths_methods_and_embeddings_that_are_not_there(service: Service) -> None:
    for path in ("/v1/nothing", "/lorakit/adapters/nobody", "/page/../../app.py"):
        response = ask(service, path)
        assert response.status_code == 404
        assert response.json()["error"]["message"]
    assert ask(service, CHAT).status_code == 405
    response = ask(service, "/v1/embeddings", {"model": "tiny", "input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_supported")


def test_a_full_queue_is_429_and_says_when_to_come_back(service: Service) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 100, "ignore_eos": True}

    async def many() -> list[httpx.Response]:
        async with tiny_server.asking(service) as client:
            return await asyncio.gather(*(client.post(TEXT, json=body) for _ in range(40)))

    responses = asyncio.run(many())
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 429}
    late = next(response for response in responses if response.status_code == 429)
    assert 1 <= int(late.headers["retry-after"]) <= 60
    assert late.json()["error"]["type"] == "rate_limit_error"


def test_a_request_given_up_while_it_is_submitted_is_cancelled(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, submitted = service.engine.submit, threading.Event()

    def slowly(request: GenerateRequest, on_event: OnEvent) -> None:
        time.sleep(0.1)
        submit(request, on_event)
        submitted.set()

    monkeypatch.setattr(service.engine, "submit", slowly)
    ends: list[FinishedEvent] = []
    sampling = SamplingOptions(max_tokens=200, ignore_eos=True)
    request = GenerateRequest(id="given-up", prompt_ids=(6, 7), sampling=sampling)

    async def give_up() -> None:
        answers = Answers(service.engine, [request], ends.append)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(answers.start(), 0.02)
        await asyncio.to_thread(submitted.wait, 10)
        while not ends:
            await asyncio.sleep(0.005)

    asyncio.run(give_up())
    assert [end.reason for end in ends] == ["abort"]
