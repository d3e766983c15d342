"""OpenAI's routes: the models, chat completions, completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from lorakit.serve.answers import Head, StreamShape, failure, whole_body
from lorakit.serve.logs import facts_of
from lorakit.serve.openai_errors import ApiError
from lorakit.serve.request import AdapterInfo
from lorakit.serve.schema import ChatBody, CompletionBody
from lorakit.serve.service import Service, Target, collect, new_id
from lorakit.serve.streams import EventStream

# nginx's number for a client that did not wait; nobody reads it, the log does.
_CLIENT_GONE = 499
# A stream is opened when it has something to say or after this time: a refusal that comes at once
# is then an HTTP status, and not an event in a stream that began with 200.
_EARLY_S = 2.0


def openai_routes(service: Service) -> APIRouter:
    """The routes of OpenAI's interface.

    Args:
        service: answers.
    """
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def models() -> dict[str, Any]:
        infos = await asyncio.to_thread(service.engine.pool.list)
        served = [info for info in infos if info.problem is None]
        data = [base_card(service), *(adapter_card(service, info) for info in served)]
        return {"object": "list", "data": data}

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        name = service.adapter_name(model)
        if name is None:
            return base_card(service)
        return adapter_card(service, await service.info(name))

    @router.post("/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        target = await service.target(body)
        turns = [message.as_turn() for message in body.messages]
        prompt = await service.prompts.chat(turns, target.passport)
        return await _answer(service, body, request, target=target, prompts=[prompt])

    @router.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        target = await service.target(body)
        prompts = [await service.prompts.text(prompt) for prompt in body.prompts()]
        return await _answer(service, body, request, target=target, prompts=prompts)

    @router.post("/embeddings")
    async def embeddings() -> Response:
        raise ApiError(
            404,
            f"{service.options.name} writes text; embeddings are not served",
            code="not_supported",
        )

    return router


def base_card(service: Service) -> dict[str, Any]:
    """The base in the list of models."""
    return {
        "id": service.options.name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "lorakit",
        "root": service.options.name,
        "parent": None,
        "max_model_len": service.options.max_context,
    }


def adapter_card(service: Service, info: AdapterInfo) -> dict[str, Any]:
    """An adapter in the list of models, with vLLM's `root` and `parent`."""
    return {
        **base_card(service),
        "id": info.name,
        "root": info.name,
        "parent": service.options.name,
    }


async def _answer(
    service: Service,
    body: ChatBody | CompletionBody,
    request: Request,
    *,
    target: Target,
    prompts: Sequence[tuple[int, ...]],
) -> Response:
    chat = isinstance(body, ChatBody)
    head = Head(
        id=new_id("chatcmpl" if chat else "cmpl"),
        model=body.model,
        kind="chat" if chat else "text",
        logprobs=body.num_logprobs() is not None,
        with_usage=body.with_usage(),
    )
    facts = facts_of(request.scope)
    answers = await service.answers(body, target, prompts, head=head, facts=facts)
    num_choices = len(prompts) * (body.n or 1)
    num_prompt_tokens = sum(map(len, prompts))
    if not body.stream:
        choices = await collect(answers, num_choices, request.receive)
        if choices is None:
            return Response(status_code=_CLIENT_GONE)
        return JSONResponse(whole_body(head, choices, num_prompt_tokens))
    early = await answers.early_end(_EARLY_S)
    error = failure(early) if early is not None else None
    if error is not None:
        answers.cancel()
        raise error
    shape = StreamShape(head, num_choices=num_choices, num_prompt_tokens=num_prompt_tokens)
    return EventStream(answers, shape)
