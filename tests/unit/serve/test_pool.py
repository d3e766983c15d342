from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from threading import Event

import pytest
import torch

import tiny_models
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    LorakitError,
    RequestError,
    StateError,
    UnknownAdapterError,
)
from lorakit.serve.pool import AdapterPool, Wanted
from lorakit.serve.request import EngineOptions
from lorakit.serve.served import ServedAdapter
from serving import save_learned

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("llama")


@pytest.fixture
def root(model, tmp_path: Path) -> Path:
    for i in range(5):
        save_learned(model, LoraSpec(r=2 + i, alpha=7.5), tmp_path / f"a{i}", seed=i)
    return tmp_path


class Pool(AdapterPool):
    """A pool that says when something has come."""

    def __init__(self, model, root: Path | None, **options: object) -> None:
        self.news = Event()
        made = EngineOptions(adapters_dir=root, **options)  # type: ignore[arg-type]
        super().__init__(model, CPU, made, on_ready=self.news.set)

    def bring(self, choice: object) -> ServedAdapter:
        wanted = self.resolve(choice)  # type: ignore[arg-type]
        assert wanted is not None
        return self.wait_for(wanted)

    def wait_for(self, wanted: Wanted) -> ServedAdapter:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.news.clear()
            found = self.acquire(wanted)
            if found is not None:
                return found
            self.news.wait(5)
        raise AssertionError("nothing came")


@pytest.fixture
def pool(model, root: Path):
    made = Pool(model, root, max_adapters_ram=3)
    yield made
    made.close()


def test_names_come_from_the_directory_with_their_passports(pool: Pool, root: Path) -> None:
    (root / "empty").mkdir()
    infos = pool.list()
    assert [info.name for info in infos] == [f"a{i}" for i in range(5)]
    assert [info.r for info in infos] == [2, 3, 4, 5, 6]
    assert all(info.state == "disk" and info.key is None for info in infos)
    assert infos[0].passport["base"]["model_type"] == "llama"
    assert "sites" not in infos[0].passport
    assert "samples" not in infos[0].passport["base"]


def test_an_unknown_name_names_its_neighbours(pool: Pool) -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        pool.resolve("a9")
    assert str(caught.value.found).count("a") == 3
    for bad in ("../a0", "", "a0/", "/etc"):
        with pytest.raises(UnknownAdapterError):
            pool.resolve(bad)


def test_the_least_recently_used_goes_first_and_what_is_in_use_stays(pool: Pool) -> None:
    held = pool.bring("a0")
    for name in ("a1", "a2", "a3"):
        pool.release(pool.bring(name))
    states = {info.name: info.state for info in pool.list()}
    assert states == {"a0": "ram", "a1": "disk", "a2": "ram", "a3": "ram", "a4": "disk"}
    assert pool.counts()[0] == 3
    pool.release(held)
    pool.release(pool.bring("a4"))
    assert pool.info("a0").state == "disk"


def test_no_adapter_comes_while_every_place_is_in_use(pool: Pool) -> None:
    held = [pool.bring(f"a{i}") for i in range(3)]
    wanted = pool.resolve("a3")
    assert wanted is not None
    assert pool.acquire(wanted) is None
    time.sleep(0.1)
    assert pool.acquire(wanted) is None
    assert pool.info("a3").state == "disk"
    pool.release(held[0])
    assert pool.wait_for(wanted).r > 0


def test_a_place_kept_for_a_request_that_has_gone_is_given_back(pool: Pool) -> None:
    for name in ("a0", "a1", "a2"):
        wanted = pool.resolve(name)
        assert wanted is not None
        pool.news.clear()
        assert pool.acquire(wanted) is None
        assert pool.news.wait(10)
    wanted = pool.resolve("a3")
    assert wanted is not None
    assert pool.acquire(wanted) is None, "all three places are kept for those who asked"
    assert pool.info("a3").state == "disk"
    pool.settle([wanted])
    assert pool.wait_for(wanted)


def test_a_failure_of_a_request_that_has_gone_is_not_the_next_one_s(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_disk(_: Path) -> Adapter:
        raise OSError("the disk is away for a moment")

    wanted = pool.resolve("a0")
    assert wanted is not None
    for settled in ([wanted], []):
        with monkeypatch.context() as patched:
            patched.setattr("lorakit.serve.pool.read_adapter", no_disk)
            pool.news.clear()
            assert pool.acquire(wanted) is None
            assert pool.news.wait(10)
        pool.settle(settled)
        if settled:
            with pytest.raises(AdapterFileError, match="could not be loaded"):
                pool.acquire(wanted)
    assert pool.wait_for(wanted)


def test_a_pinned_adapter_is_never_evicted(pool: Pool) -> None:
    assert pool.load("a0", pin=True).pinned
    for name in ("a1", "a2", "a3", "a4"):
        pool.release(pool.bring(name))
    assert pool.info("a0").state == "ram"
    pool.load("a1", pin=True)
    with pytest.raises(RequestError, match="pinned"):
        pool.load("a2", pin=True)


def test_the_key_is_the_content(pool: Pool, root: Path) -> None:
    shutil.copytree(root / "a1", root / "copy")
    one, copy, other = pool.bring("a1"), pool.bring("copy"), pool.bring("a2")
    assert one is copy
    assert one.key != other.key
    pool.release(one)
    pool.release(copy)
    pool.release(other)


def test_a_name_that_is_loaded_again_means_the_new_content(model, pool: Pool, root: Path) -> None:
    old = pool.bring("a0")
    before = pool.resolve("a0")
    save_learned(model, LoraSpec(r=6, alpha=3.0), root / "a0", seed=99)
    new = pool.bring("a0")
    assert new.key != old.key
    assert new.r == 6
    assert pool.resolve("a0") != before
    pool.release(old)
    pool.release(new)
    # What the directory held before is meant by nobody: its memory is given back at once.
    assert pool.counts()[0] == 1


def test_load_and_unload(model, root: Path, tmp_path_factory) -> None:
    elsewhere = save_learned(model, LoraSpec(r=3), tmp_path_factory.mktemp("x") / "y")
    pool = Pool(model, None)
    assert pool.list() == []
    info = pool.load("mine", elsewhere)
    assert (info.name, info.state, info.r) == ("mine", "ram", 3)
    assert info.key is not None
    held = pool.bring("mine")
    pool.unload("mine")
    with pytest.raises(UnknownAdapterError):
        pool.resolve("mine")
    with pytest.raises(UnknownAdapterError):
        pool.unload("mine")
    assert pool.counts()[0] == 1, "a request still holds it"
    pool.release(held)
    assert pool.counts()[0] == 0
    with pytest.raises(RequestError, match="path"):
        pool.load("mine")
    with pytest.raises(StateError):
        pool.load("../mine", elsewhere)
    pool.close()


def test_an_unloaded_name_of_the_directory_can_be_loaded_again(pool: Pool) -> None:
    pool.unload("a0")
    assert "a0" not in [info.name for info in pool.list()]
    pool.load("a0")
    assert pool.info("a0").state == "ram"


def test_nothing_outside_the_directory_is_read(model, pool: Pool, root: Path, tmp_path_factory):
    outside = save_learned(model, LoraSpec(r=3), tmp_path_factory.mktemp("out") / "secret")
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    shutil.copy(root / "a0" / "adapter_config.json", root / "half")
    (root / "half" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    for path in (outside, root / "link", root / "half", root / ".." / outside.name, root):
        with pytest.raises((RequestError, AdapterFileError)):
            pool.load("x", path)
    with pytest.raises(RequestError, match="outside"):
        pool.resolve("link")
    assert pool.info("a0").name == "a0"


def corrupt(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def not_finite(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)


def other_shape(path: Path) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "r": 9}))


def pickled(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


@pytest.mark.parametrize("spoil", [corrupt, not_finite, other_shape, pickled])
def test_a_bad_adapter_is_refused_with_the_reason(pool: Pool, root: Path, spoil) -> None:
    spoil(root / "a1")
    with pytest.raises(AdapterFileError) as caught:
        pool.load("a1")
    assert caught.value.what
    with pytest.raises(AdapterFileError):
        pool.bring("a1")
    pool.release(pool.bring("a0"))


def test_an_adapter_of_another_base_is_refused(pool: Pool, root: Path) -> None:
    other = tiny_models.build("llama", seed=5)
    save_learned(other, LoraSpec(r=3), root / "other")
    with pytest.raises(BaseMismatchError):
        pool.load("other")
    allowed = Pool(pool._model, root, any_base=True)
    assert allowed.load("other").state == "ram"
    allowed.close()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"also_train": ("lm_head",)}, "lm_head"),
        ({"r": 20, "targets": "all-linear"}, "rank"),
    ],
)
def test_what_cannot_be_served_is_refused(model, root: Path, spec: dict, reason: str) -> None:
    save_learned(model, LoraSpec(**{"r": 3, **spec}), root / "odd")
    pool = Pool(model, root, max_rank=16)
    with pytest.raises(AdapterFileError) as caught:
        pool.load("odd")
    assert reason in str(caught.value)
    pool.close()


@pytest.mark.parametrize("choice", [{}, {"a0": float("nan")}, {"a0": float("inf")}])
def test_compositions_that_cannot_be(pool: Pool, choice: dict) -> None:
    with pytest.raises(RequestError):
        pool.resolve(choice)


def test_a_composition_is_one_more_adapter(pool: Pool) -> None:
    one = pool.bring({"a0": 0.5, "a1": 0.25})
    again = pool.bring({"a1": 0.25, "a0": 0.5})
    other = pool.bring({"a0": 0.5, "a1": 0.5})
    assert one is again
    assert one.key != other.key
    assert one.r == 2 + 3


def test_the_directory_of_adapters_must_be_there(model, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="directory"):
        Pool(model, tmp_path / "nowhere")


def test_what_training_leaves_is_found_under_the_run_s_name(
    model, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = LoraSpec(r=2, alpha=5.0)
    save_learned(model, spec, tmp_path / "kettle" / "adapter", seed=1)
    save_learned(model, spec, tmp_path / "plain", seed=2)
    # An adapter's directory is what it is, whatever else lies in it.
    save_learned(model, spec, tmp_path / "plain" / "adapter", seed=3)
    outside = save_learned(model, spec, tmp_path_factory.mktemp("outside") / "a", seed=4)
    for name in ("led-out", "file-led-out"):
        (tmp_path / name).mkdir()
    (tmp_path / "led-out" / "adapter").symlink_to(outside)
    shutil.copytree(outside, tmp_path / "file-led-out" / "adapter")
    tensors = tmp_path / "file-led-out" / "adapter" / "adapter_model.safetensors"
    tensors.unlink()
    tensors.symlink_to(outside / "adapter_model.safetensors")
    (tmp_path / "data").mkdir()
    made = Pool(model, tmp_path)
    try:
        infos = {info.name: info for info in made.list()}
        assert list(infos) == ["file-led-out", "kettle", "led-out", "plain"]
        assert infos["kettle"].path == tmp_path / "kettle" / "adapter"
        assert infos["plain"].path == tmp_path / "plain"
        for name in ("led-out", "file-led-out"):
            assert "outside the directory" in str(infos[name].problem)
            with pytest.raises(RequestError, match="outside the directory"):
                made.resolve(name)
        served = made.bring("kettle")
        assert served.key == made.load("again", tmp_path / "kettle" / "adapter").key
        assert served.key == made.load("kettle").key != made.bring("plain").key
    finally:
        made.close()


def test_what_another_method_learned_is_listed_with_the_reason(pool: Pool, root: Path) -> None:
    for path in (root / "bitfit", root / "run" / "adapter"):
        path.mkdir(parents=True)
        document = {"format": 1, "method": "bitfit", "options": {}}
        (path / "lorakit.json").write_text(json.dumps(document))
    for name in ("bitfit", "run"):
        (info,) = (info for info in pool.list() if info.name == name)
        assert "'bitfit'" in str(info.problem)
        with pytest.raises(AdapterFileError, match="'bitfit'"):
            pool.resolve(name)


def test_a_thousand_adapters_are_listed_in_under_a_second(model, tmp_path: Path) -> None:
    first = save_learned(model, LoraSpec(r=2, alpha=5.0, targets="qv"), tmp_path / "a0000")
    files = {file.name: file.read_bytes() for file in first.iterdir()}
    for i in range(1, 1000):
        path = tmp_path / f"a{i:04d}"
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
    made = Pool(model, tmp_path)
    try:
        start = time.process_time()
        infos = made.list()
        assert time.process_time() - start < 1
        assert len(infos) == 1000
        assert {info.r for info in infos} == {2}
        # Nothing is read into memory, and nothing is read twice.
        assert made.counts() == (0, 0)
        start = time.process_time()
        assert [info.name for info in made.list()] == [info.name for info in infos]
        assert time.process_time() - start < 1
    finally:
        made.close()


def test_errors_are_ours(pool: Pool, root: Path) -> None:
    (root / "a2" / "adapter_config.json").write_text("{")
    info = pool.info("a2")
    assert info.problem
    with pytest.raises(LorakitError):
        pool.load("a2")
