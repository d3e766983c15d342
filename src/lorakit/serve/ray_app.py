"""lorakit's own server as an application of Ray Serve: replicas of it behind one address.

    serve run lorakit.serve.ray_app:app model=smollm2-135m-instruct adapters=/shared/adapters

Every replica holds the base and reads adapters from the directory when it is first asked for them,
so the directory must be one that all machines see.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorakit.errors import ConfigError, unknown_name
from lorakit.models.load import load_model
from lorakit.serve.app import create_app
from lorakit.serve.auth import Keys
from lorakit.serve.logs import start_logs
from lorakit.serve.request import EngineOptions
from lorakit.serve.run import ListenOptions
from lorakit.serve.start import ServeSettings, check, started

if TYPE_CHECKING:
    from ray.serve import Application


class RaySettings(BaseModel):
    """What `serve run` takes as KEY=VALUE.

    Attributes:
        model: the base, as `lorakit serve` takes it.
        adapters: a directory of adapters that every replica sees.
        name: the base's name in requests.
        quantize: "nf4" keeps the base in 4 bits.
        replicas: how many copies of the base answer.
        cpus: cores per replica; torch takes as many threads.
        gpus: GPUs per replica.
        max_batch: requests that one replica answers together.
        max_queue: requests that wait at one replica; one more is refused.
        allow_host: further names the server is asked by, commas between them; with an API key all.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    adapters: Path | None = None
    name: str | None = None
    quantize: Literal["nf4"] | None = None
    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    max_batch: int = Field(default=16, ge=1)
    max_queue: int = Field(default=256, ge=1)
    allow_host: str = ""

    def for_replica(self) -> ServeSettings:
        """What each replica serves; the keys come from the environment of whoever asks."""
        api = os.environ.get("LORAKIT_API_KEY") or None
        return ServeSettings(
            model=self.model,
            name=self.name,
            quantize=self.quantize,
            device="cuda" if self.gpus else None,
            engine=EngineOptions(
                adapters_dir=self.adapters, max_batch=self.max_batch, max_queue=self.max_queue
            ),
            # Ray listens. Without a key, names are guarded as on a server for this machine alone.
            listen=ListenOptions(host="127.0.0.1" if api is None else "0.0.0.0"),
            # Loading by request would reach one replica of several: the directory is for all.
            keys=Keys(api=api),
            host_names=tuple(name for name in self.allow_host.split(",") if name),
        )


def app(args: Mapping[str, Any] | RaySettings) -> Application:
    """The application that `serve run` and `serve build` start.

    Args:
        args: the KEY=VALUE of the command line: see `RaySettings`.

    Raises:
        ConfigError: a key that is not known, or a value of another kind.
        RequestError: a setting cannot be; before anything is started.
    """
    asked = _asked(args)
    settings = asked.for_replica()
    check(settings)
    from ray import serve

    def build() -> FastAPI:
        return replica_app(settings)

    deployed = serve.deployment(
        name="lorakit",
        num_replicas=asked.replicas,
        # The queue is the engine's: it refuses with 429, and is fair between adapters.
        max_ongoing_requests=asked.max_batch + asked.max_queue + 8,
        ray_actor_options={"num_cpus": asked.cpus, "num_gpus": asked.gpus},
        graceful_shutdown_timeout_s=settings.listen.drain_s,
    )
    return deployed(serve.ingress(build)()).bind()


def _asked(args: Mapping[str, Any] | RaySettings) -> RaySettings:
    try:
        return RaySettings.model_validate(args)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            what = f"the application has no setting {key!r}"
            raise unknown_name(ConfigError, what, key, RaySettings.model_fields) from None
        missing = first["type"] == "missing"
        raise ConfigError(
            f"the application needs {key}=" if missing else f"{key}= cannot be this",
            expected=None if missing else first["msg"],
            found=None if missing else repr(first["input"]),
            remedy="serve run lorakit.serve.ray_app:app model=NAME adapters=DIR",
        ) from None


def replica_app(settings: ServeSettings) -> FastAPI:
    """The HTTP side of one replica over an engine of its own, which ends with it.

    Args:
        settings: what to serve.
    """
    start_logs("json")
    model, tokenizer = load_model(settings.model, settings.quantize, device=settings.device)
    running = ExitStack()
    made = create_app(running.enter_context(started(model, tokenizer, settings)))

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        with running:
            yield

    made.router.lifespan_context = life
    return made
