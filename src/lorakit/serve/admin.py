"""Loading and unloading adapters while the server runs, with vLLM's paths and bodies."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from lorakit.errors import UnknownAdapterError
from lorakit.serve.confine import adapter_inside
from lorakit.serve.logs import log
from lorakit.serve.openai_errors import ApiError
from lorakit.serve.schema import LoadBody, UnloadBody
from lorakit.serve.service import Service


def admin_routes(service: Service) -> APIRouter:
    """The routes that the admin key guards (`lorakit.serve.auth.ADMIN_PATHS`).

    Args:
        service: holds the pool.
    """
    router = APIRouter(prefix="/v1")
    pool = service.engine.pool

    def load(body: LoadBody) -> None:
        if service.adapter_name(body.lora_name) != body.lora_name or ":" in body.lora_name:
            raise ApiError(400, f"{body.lora_name[:200]!r} means the base", param="lora_name")
        path = adapter_inside(service.options.adapters_dir, body.lora_path)
        if not body.load_inplace and _is_in_memory(service, body.lora_name):
            raise ApiError(
                400,
                f"the adapter {body.lora_name!r} is loaded already; to read it again send "
                "load_inplace: true",
                code="already_loaded",
                param="lora_name",
            )
        pool.load(body.lora_name, path)

    @router.post("/load_lora_adapter")
    async def load_lora_adapter(body: LoadBody) -> PlainTextResponse:
        await asyncio.to_thread(load, body)
        log("adapter loaded", {"adapter": body.lora_name})
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadBody) -> PlainTextResponse:
        try:
            await asyncio.to_thread(pool.unload, body.lora_name)
        except UnknownAdapterError as error:
            raise service.no_such_model(body.lora_name, error) from error
        log("adapter unloaded", {"adapter": body.lora_name})
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _is_in_memory(service: Service, name: str) -> bool:
    try:
        return service.engine.pool.info(name).state != "disk"
    except UnknownAdapterError:
        return False
