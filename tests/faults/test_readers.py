"""Every reader gives what is in a file or refuses with a LorakitError, whatever the bytes are.

The default run is small and always the same; `-m slow` tries more, with new examples each time.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import tiny_models
from fuzzing import QUICK, THOROUGH, any_bytes, changed, odd_json, refuses_or_reads
from learned import attach_learned
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.bind import plan_binding
from lorakit.adapters.spec import LoraSpec
from lorakit.data.readers import READERS, reader_for
from lorakit.errors import DataError, ModelError
from lorakit.formats.foreign import Conversion
from lorakit.formats.gguf_header import check_gguf_header
from lorakit.formats.peft import save_adapter
from lorakit.formats.registry import FOREIGN, format_of
from lorakit.methods.files import read_saved, read_state
from lorakit.models.checkpoint import estimate_model_bytes
from lorakit.models.gguf import converted
from lorakit.train.config import TrainConfig

_EFFORTS = [
    pytest.param(QUICK, id="quick"),
    pytest.param(THOROUGH, id="thorough", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Originals:
    """Good files, and the model that they are for."""

    directory: Path
    model: torch.nn.Module

    def conversion(self) -> Conversion:
        return Conversion(model=self.model, base="base", alpha=7.5)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    directory = tmp_path_factory.mktemp("originals")
    model = tiny_models.build("llama")
    attach_learned(model, LoraSpec(r=3, alpha=7.5, targets=("q_proj", "down_proj")))
    adapter = save_adapter(model, directory / "peft")
    plain = tiny_models.build("llama")
    plain.save_pretrained(directory / "model")
    found = Originals(directory, plain)
    for name, foreign in FOREIGN.items():
        (directory / name).mkdir()
        foreign.write(adapter, directory / name, found.conversion())
    return found


def _try(
    effort: settings, contents: st.SearchStrategy[Any], attempt: Callable[[Any], bool]
) -> list[bool]:
    """Run an attempt on many contents; whether each was read."""
    found: list[bool] = []

    @settings(
        effort,
        suppress_health_check=list(HealthCheck),
        # Not shrunk: an example that takes seconds would be tried a thousand times.
        phases=[Phase.explicit, Phase.generate],
    )
    @given(contents)
    def attempts(content: Any) -> None:
        found.append(attempt(content))

    attempts()
    return found


def _replace(directory: Path, target: Path, name: str, content: bytes) -> None:
    """A copy of a directory with one file replaced."""
    target.mkdir(exist_ok=True)
    for file in directory.iterdir():
        link = target / file.name
        link.unlink(missing_ok=True)
        if file.name == name:
            link.write_bytes(content)
        else:
            link.hardlink_to(file)


@pytest.mark.parametrize("effort", _EFFORTS)
@pytest.mark.parametrize("name", ["adapter_config.json", "lorakit.json"])
def test_the_documents_of_an_adapter(
    originals: Originals, tmp_path: Path, name: str, effort: settings
) -> None:
    source = originals.directory / "peft"
    whole = (source / name).read_bytes()
    documents = changed(json.loads(whole)).map(lambda value: json.dumps(value).encode())
    nested = st.sampled_from([b"[" * 200_000, b'{"r": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"])

    def attempt(content: bytes) -> bool:
        _replace(source, tmp_path / "copy", name, content)
        return refuses_or_reads(
            lambda: plan_binding(originals.model, Adapter.load(tmp_path / "copy")), tmp_path
        )

    found = _try(effort, documents | any_bytes(whole) | nested, attempt)
    assert not all(found)


@pytest.mark.parametrize("effort", _EFFORTS)
def test_the_tensors_of_an_adapter(originals: Originals, tmp_path: Path, effort: settings) -> None:
    source, name = originals.directory / "peft", "adapter_model.safetensors"

    def attempt(content: bytes) -> bool:
        _replace(source, tmp_path / "copy", name, content)
        return refuses_or_reads(
            lambda: plan_binding(originals.model, Adapter.load(tmp_path / "copy")), tmp_path
        )

    found = _try(effort, any_bytes((source / name).read_bytes()), attempt)
    assert not all(found)


@pytest.mark.parametrize("effort", _EFFORTS)
@pytest.mark.parametrize("name", FOREIGN)
def test_the_files_of_other_tools(
    originals: Originals, tmp_path: Path, name: str, effort: settings
) -> None:
    source = originals.directory / name
    names = sorted(file.name for file in source.iterdir())
    contents = st.one_of(
        [st.tuples(st.just(file), any_bytes((source / file).read_bytes())) for file in names]
    )

    def attempt(content: tuple[str, bytes]) -> bool:
        _replace(source, tmp_path / "copy", *content)
        path = tmp_path / "copy"
        path = path if FOREIGN[name].recognises(path) else path / names[0]

        def read() -> None:
            format_of(path)
            FOREIGN[name].read(path, originals.conversion())

        return refuses_or_reads(read, tmp_path)

    found = _try(effort, contents, attempt)
    assert not all(found)


@pytest.mark.parametrize("effort", _EFFORTS)
@pytest.mark.parametrize("ending", [*READERS, ".jsonl.gz"])
def test_rows(tmp_path: Path, ending: str, effort: settings) -> None:
    rows = [{"prompt": f"p {i}", "completion": 'a,\t"b"', "n": i} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    good = {
        ".json": json.dumps(rows).encode(),
        ".csv": b'prompt,completion\n"a ""b""",c\nd,"e\nf"\n',
        ".tsv": b"prompt\tcompletion\na\tb\n",
        ".parquet": _parquet(rows, tmp_path),
        ".jsonl.gz": gzip.compress(lines, mtime=0),
    }.get(ending, lines)
    file = tmp_path / f"rows{ending}"
    documents = st.lists(odd_json, max_size=3).map(
        lambda values: "\n".join(json.dumps(value) for value in values).encode()
    )
    nested = st.sampled_from([b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}", b'"\xed\xa0\x80"'])

    def attempt(content: bytes) -> bool:
        file.write_bytes(content)
        reader = reader_for(file)
        assert reader is not None
        return refuses_or_reads(lambda: list(reader(file)), tmp_path)

    found = _try(effort, any_bytes(good) | documents | nested, attempt)
    assert not all(found)


def test_text_of_a_parquet_file_that_is_not_utf_8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    offsets = pyarrow.py_buffer(struct.pack("<ii", 0, 2))
    text = pyarrow.StringArray.from_buffers(1, offsets, pyarrow.py_buffer(b"\xff\xfe"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="cannot read this Parquet file"):
        list(READERS[".parquet"](tmp_path / "rows.parquet"))


def _parquet(rows: list[dict[str, Any]], directory: Path) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    path = directory / "good.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


_CONFIG: dict[str, Any] = {
    "model": "m",
    "data": {"train": "rows.jsonl", "columns": {"prompt": "a"}},
    "task": "dpo",
    "lora": {"r": 4, "rank_pattern": {"q_proj": 2}, "targets": ["q_proj"]},
    "train": {"epochs": 1, "lr": 1e-4, "adam_betas": [0.9, 0.99]},
    "preference": {"beta": 0.2},
    "output": "out",
}
_BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 8)}]\n" for i in range(9)
)


@pytest.mark.parametrize("effort", _EFFORTS)
def test_training_configs(tmp_path: Path, effort: settings) -> None:
    file = tmp_path / "config.yaml"
    whole = yaml.safe_dump(_CONFIG).encode()
    documents = changed(_CONFIG).map(lambda value: yaml.safe_dump(value).encode())
    hostile = st.sampled_from(
        [
            _BOMB.encode(),
            b"model: &m [*m]\n",
            b"data: &d {train: *d}\n",
            b"model: " + b"[" * 20_000,
            b"model: 2020-13-45\n",
            b"seed: " + b"9" * 5000 + b"\n",
            b"seed: 0x" + b"f" * 5000 + b"\n",
            b"? [a, b]\n: c\n",
            b"model: !!python/object/apply:os.system [ls]\n",
            b"lora: {targets: " + _BOMB.partition("\n")[0][3:].encode() + b"}\n",
        ]
    )

    def attempt(content: bytes) -> bool:
        file.write_bytes(content)
        return refuses_or_reads(lambda: TrainConfig.from_yaml(file), tmp_path)

    found = _try(effort, documents | any_bytes(whole) | hostile, attempt)
    assert not all(found)


def _gguf(*facts: bytes, tensors: Sequence[bytes] = ()) -> bytes:
    """A GGUF file of version 3 with these facts and tensors, and 64 bytes of data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    body = head + b"".join(facts) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + bytes(64)


def _named(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


_ARCHITECTURE = _named("general.architecture") + struct.pack("<I", 8) + _named("llama")
_COUNTS = [_named(f"llama.{key}") + struct.pack("<II", 4, 8) for key in ("block_count", "head")]
# Type 9 is an array, of type 0 (bytes) and 8 (texts), of so many as nobody has.
_ENDLESS = [_named("a") + struct.pack("<IIQ", 9, kind, 2**40) for kind in (0, 8)]
# 16 numbers in float32, all at the same place.
_SAME = [_named(f"t{i}") + struct.pack("<IQIQ", 1, 16, 0, 0) for i in range(3)]


@pytest.mark.parametrize("effort", _EFFORTS)
def test_the_gguf_file_of_a_model(
    tmp_path: Path, effort: settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    whole = _gguf(_ARCHITECTURE, *_COUNTS, tensors=_SAME)
    hostile = st.sampled_from([_gguf(_ARCHITECTURE, fact) for fact in _ENDLESS])

    def attempt(content: bytes) -> bool:
        file.write_bytes(content)
        return refuses_or_reads(lambda: converted(file, name="a model"), tmp_path)

    assert not any(_try(effort, hostile | any_bytes(whole), attempt))


def test_tensors_that_lie_over_each_other_do_not_multiply_a_file(tmp_path: Path) -> None:
    file = tmp_path / "adapter.gguf"
    most = 16 * 64
    names = [_named(f"t{i}") + struct.pack("<IQIQ", 1, most, 0, 0) for i in range(60)]
    file.write_bytes(_gguf(_ARCHITECTURE, tensors=names))
    with pytest.raises(ValueError, match="larger than the file"):
        check_gguf_header(file)
    file.write_bytes(_gguf(_ARCHITECTURE, tensors=_SAME))
    check_gguf_header(file)


@pytest.mark.parametrize("effort", _EFFORTS)
def test_the_index_of_a_model(originals: Originals, tmp_path: Path, effort: settings) -> None:
    source = originals.directory / "model"
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors"}}
    documents = changed(index).map(lambda value: json.dumps(value).encode())
    weights = (source / "model.safetensors").read_bytes()
    nested = st.sampled_from([b"[" * 200_000, b'{"weight_map": ' + b"9" * 5000 + b"}"])
    contents = st.tuples(
        documents | nested | any_bytes(json.dumps(index).encode()), any_bytes(weights)
    )

    def attempt(content: tuple[bytes, bytes]) -> bool:
        (tmp_path / "model.safetensors.index.json").write_bytes(content[0])
        (tmp_path / "one.safetensors").write_bytes(content[1])
        return refuses_or_reads(lambda: estimate_model_bytes(tmp_path), tmp_path)

    found = _try(effort, contents, attempt)
    assert not all(found)


def test_an_index_that_names_what_no_file_can_be_called(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x" * 400}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="missing"):
        estimate_model_bytes(tmp_path)


@pytest.mark.parametrize("effort", _EFFORTS)
def test_the_directory_of_another_method(tmp_path: Path, effort: settings) -> None:
    passport = {"method": "bitfit", "options": {"add": False, "also_train": []}, "format": 1}
    documents = changed(passport).map(lambda value: json.dumps(value).encode())

    def attempt(content: bytes) -> bool:
        (tmp_path / "lorakit.json").write_bytes(content)

        def read() -> None:
            read_state(read_saved(tmp_path).path)

        return refuses_or_reads(read, tmp_path)

    found = _try(effort, documents | any_bytes(json.dumps(passport).encode()), attempt)
    assert not all(found)
