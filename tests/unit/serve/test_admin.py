"""Loading and unloading while the server runs, confined to the directory of adapters."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import tiny_server
from lorakit.errors import AdapterFileError, RequestError
from lorakit.serve.auth import Keys
from lorakit.serve.catalog import Catalog
from lorakit.serve.confine import adapter_inside
from lorakit.serve.request import EngineOptions
from lorakit.serve.service import Service
from lorakit.serve.start import ServeSettings

ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture(scope="module")
def directory(served_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of our own, because these tests change it."""
    path = tmp_path_factory.mktemp("own") / "adapters"
    shutil.copytree(served_adapters, path)
    return path


@pytest.fixture(scope="module")
def own(served_base: Path, directory: Path) -> Iterator[Service]:
    options = EngineOptions(adapters_dir=directory)
    settings = ServeSettings(
        model=str(served_base), name="tiny", engine=options, keys=Keys(admin="root")
    )
    with tiny_server.in_process(settings) as made:
        yield made


def post(service: Service, path: str, **body: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with tiny_server.asking(service) as client:
            return await client.post(path, json=body, headers=ADMIN)

    return asyncio.run(once())


def load(service: Service, name: str, path: str, **more: Any) -> httpx.Response:
    return post(service, "/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)


def said(service: Service, model: str) -> str | None:
    body = {"model": model, "prompt": "ab", "max_tokens": 12, "temperature": 0}
    response = post(service, "/v1/completions", **body)
    return response.json()["choices"][0]["text"] if response.status_code == 200 else None


def test_load_answer_unload(own: Service, directory: Path) -> None:
    assert said(own, "sql-v2") is None
    response = load(own, "sql-v2", "sql")
    assert response.status_code == 200, response.text
    assert "sql-v2" in response.text
    assert said(own, "sql-v2") == said(own, "sql") is not None
    again = load(own, "sql-v2", "chat")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "already_loaded")
    assert load(own, "sql-v2", "chat", load_inplace=True).status_code == 200
    # The name means other weights now: nothing of the old ones may be left in a cache.
    assert said(own, "sql-v2") == said(own, "chat") != said(own, "sql")
    assert post(own, "/v1/unload_lora_adapter", lora_name="sql-v2").status_code == 200
    assert said(own, "sql-v2") is None
    gone = post(own, "/v1/unload_lora_adapter", lora_name="sql-v2")
    assert gone.status_code == 404


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(own: Service) -> None:
    for name, path in (("x", "broken"), ("tiny", "sql"), ("base", "sql"), ("../x", "sql")):
        response = load(own, name, path)
        assert response.status_code == 400, name
        assert response.json()["error"]["message"]
    assert said(own, "x") is None
    assert load(own, "x", "sql", is_3d=True).json()["error"]["code"] == "unknown_parameter"


def test_a_new_directory_is_served_without_a_load(own: Service, directory: Path) -> None:
    shutil.copytree(directory / "chat", directory / "late")
    assert load(own, "late", "late").status_code == 200
    assert said(own, "late") == said(own, "chat")


class TestConfinement:
    """Real paths, whatever a path looks like."""

    @pytest.fixture
    def places(self, served_adapters: Path, tmp_path: Path) -> tuple[Path, Path]:
        root, outside = tmp_path / "root", tmp_path / "outside"
        shutil.copytree(served_adapters / "sql", root / "sql")
        shutil.copytree(served_adapters / "sql", outside)
        return root, outside

    def test_inside(self, places: tuple[Path, Path]) -> None:
        root, _ = places
        (root / "same").symlink_to("sql")
        shutil.copytree(root / "sql", root / "deeper" / "sql")
        assert adapter_inside(root, "sql") == root / "sql"
        assert adapter_inside(root, "./sql/") == root / "sql"
        assert adapter_inside(root, "same") == root / "sql"
        assert adapter_inside(root, "deeper/sql") == root / "deeper" / "sql"
        # What training leaves.
        shutil.copytree(root / "sql", root / "run" / "adapter")
        assert adapter_inside(root, "run") == root / "run" / "adapter"

    @pytest.mark.parametrize("path", ["../outside", "sql/../../outside", "", ".", "sql\0", "/etc"])
    def test_paths_out(self, places: tuple[Path, Path], path: str) -> None:
        with pytest.raises(AdapterFileError, match="leads out"):
            adapter_inside(places[0], path)

    @pytest.mark.parametrize("path", [300 * "a", "a/" * 3000, "sql/" + 5000 * "b"])
    def test_paths_longer_than_the_disk_has(self, places: tuple[Path, Path], path: str) -> None:
        with pytest.raises(AdapterFileError, match="no adapter here"):
            adapter_inside(places[0], path)

    def test_a_directory_that_cannot_be_looked_into_is_none(
        self, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root, _ = places
        shutil.copytree(root / "sql", root / "private")
        is_file = Path.is_file

        def refuse(self: Path) -> bool:
            if "private" in self.parts:
                raise PermissionError("not yours")
            return is_file(self)

        monkeypatch.setattr(Path, "is_file", refuse)
        assert Catalog(root).names() == ["sql"]

    def test_an_absolute_path_leads_in_or_is_refused(self, places: tuple[Path, Path]) -> None:
        root, outside = places
        assert adapter_inside(root, str(root / "sql")) == root / "sql"
        (root / "link").symlink_to(outside)
        for path in (root, outside, root / "link", root / "sql" / ".." / ".." / "outside"):
            with pytest.raises(AdapterFileError, match="leads out"):
                adapter_inside(root, str(path))

    def test_links_out(self, places: tuple[Path, Path]) -> None:
        root, outside = places
        (root / "run").mkdir()
        (root / "run" / "adapter").symlink_to(outside)
        with pytest.raises(AdapterFileError, match="leads out"):
            adapter_inside(root, "run")
        (root / "link").symlink_to(outside)
        with pytest.raises(AdapterFileError, match="leads out"):
            adapter_inside(root, "link")
        for name in ("adapter_config.json", "adapter_model.safetensors", "lorakit.json"):
            shutil.copytree(root / "sql", root / f"linked-{name}")
            (root / f"linked-{name}" / name).unlink()
            (root / f"linked-{name}" / name).symlink_to(outside / name)
            with pytest.raises(AdapterFileError, match="leads out"):
                adapter_inside(root, f"linked-{name}")

    def test_a_root_behind_a_link_is_as_good(self, places: tuple[Path, Path]) -> None:
        root, _ = places
        link = root.parent / "link-to-root"
        link.symlink_to(root)
        assert adapter_inside(link, "sql") == root / "sql"

    def test_only_safetensors(self, places: tuple[Path, Path]) -> None:
        root, _ = places
        (root / "sql" / "adapter_model.safetensors").rename(root / "sql" / "adapter_model.bin")
        with pytest.raises(AdapterFileError, match="safetensors"):
            adapter_inside(root, "sql")
        with pytest.raises(AdapterFileError, match="no adapter here"):
            adapter_inside(root, "nothing")
        with pytest.raises(AdapterFileError, match="no directory"):
            adapter_inside(None, "sql")


def test_without_a_directory_nothing_is_loaded(own: Service) -> None:
    closed = Service(own.engine, own.prompts, options=replace(own.options, adapters_dir=None))
    assert load(closed, "x", "sql").status_code == 400


def test_an_adapter_with_the_base_s_name_stops_the_start(
    served_base: Path, served_adapters: Path, tmp_path: Path
) -> None:
    options = EngineOptions(adapters_dir=tmp_path)
    settings = ServeSettings(model=str(served_base), engine=options)
    for name in ("tiny", "base"):
        shutil.copytree(served_adapters / "sql", tmp_path / name)
        with (
            pytest.raises(RequestError, match="base's name") as caught,
            tiny_server.in_process(settings),
        ):
            pass
        assert name in (caught.value.found or "")
        shutil.rmtree(tmp_path / name)
    with tiny_server.in_process(settings) as service:
        assert service.options.name == "tiny"
