"""Requests made from the server's OpenAPI page: each is answered, or refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tiny_server
from fuzzing import THOROUGH
from lorakit.serve.app import create_app
from lorakit.serve.auth import Keys
from lorakit.serve.request import EngineOptions
from lorakit.serve.start import ServeSettings

schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
pytestmark = pytest.mark.slow
EFFORT = settings(
    THOROUGH,
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
NAMES = st.sampled_from([None, "tiny", "sql", "chat", "broken", "../adapters/sql"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server's address, and its OpenAPI page."""
    directory = tmp_path_factory.mktemp("http")
    base = tiny_server.write_base(directory / "tiny")
    options = EngineOptions(adapters_dir=tiny_server.write_adapters(base, directory / "adapters"))
    made = ServeSettings(
        model=str(base), name="tiny", engine=options, max_tokens=4, keys=Keys(admin="root")
    )
    with tiny_server.in_process(made) as service:
        with warnings.catch_warnings():
            # GET and HEAD of one path have one operation id.
            warnings.simplefilter("ignore", UserWarning)
            page = create_app(service).openapi()
        with tiny_server.serving(service) as url:
            yield url, page


def _name_it(case: Any, name: str | None) -> None:
    """Ask for what is served: no generated name ever is."""
    places = [case.body, case.path_parameters] if name is not None else []
    for place in places:
        for key in ("model", "name", "lora_name", "lora_path"):
            if isinstance(place, dict) and key in place:
                place[key] = name


def test_no_request_is_an_error_of_the_server(served: tuple[str, dict[str, Any]]) -> None:
    url, page = served
    schema = schemathesis.openapi.from_dict(page)
    asked: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()

        @EFFORT
        @given(case=operation.as_strategy(), name=NAMES)
        def answered(case: Any, name: str | None) -> None:
            _name_it(case, name)
            response = case.call(base_url=url, headers={"Authorization": "Bearer root"})
            asked.setdefault(case.operation.label, set()).add(response.status_code)
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        answered()
    # Neither were all refused, nor all answered.
    asked_for = asked["POST /v1/chat/completions"] | asked["POST /v1/completions"]
    assert {200, 400, 404} <= asked_for, asked
