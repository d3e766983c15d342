"""4-bit bases from the command line: what works, and what a machine lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.cli.main import main

# A module that is found before the installed one.
BROKEN = {
    "no library": 'raise ImportError("libgomp.so.1: cannot open shared object file")\n',
    "no kernels": (
        "from bitsandbytes import functional\n__version__ = '0.50.0'\n",
        "def quantize_4bit(*args, **kwargs):\n"
        "    raise RuntimeError('this processor has no such kernel')\n",
    ),
}
# What stands in sitecustomize.py where nothing is installed: the import system finds nothing.
MISSING = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] == "bitsandbytes" else find(name, path, target)

PathFinder.find_spec = staticmethod(find_others)
"""


@pytest.fixture(scope="module")
def nf4_run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lorakit train` leaves of a run on a 4-bit base."""
    folder = tmp_path_factory.mktemp("nf4")
    config = folder / "config.yaml"
    config.write_text(
        f"model: {{ref: {base}}}\ndata: {{train: {data}}}\noutput: {folder / 'run'}\n"
    )
    words = ["lora.r=4", "lora.update=dora", "train.epochs=1", "train.batch_size=4"]
    words += ["model.quantize=nf4", "model.dtype=bfloat16", "train.lr=0.01"]
    assert main(["train", str(config), *words]) == 0
    return folder / "run"


def test_train_says_what_is_in_4_bits_and_what_it_computes_in(nf4_run: Path) -> None:
    found = json.loads((nf4_run / "run.json").read_text())["base"]["quantization"]
    assert (found["storage"], found["num_layers"]) == ("nf4", 14)
    assert found["compute_dtype"] == "bfloat16"


def test_eval_and_generate_answer_from_4_bits(
    answer: Any, data: Path, nf4_run: Path, recwarn: pytest.WarningsRecorder
) -> None:
    adapter = nf4_run / "adapter"
    words = ["--max-new-tokens", "4", "--quantize", "nf4"]
    code, result = answer("generate", "1+2", "--adapter", adapter, *words)
    assert code == 0, result
    code, result = answer("eval", data, "--adapter", adapter, "--metric", "perplexity", *words)
    assert code == 0, result
    assert not [w for w in recwarn if "trained beside" in str(w.message)]


@pytest.mark.parametrize(
    "options",
    [[], ["--onto", "nf4-dequantized"], ["--onto", "nf4-dequantized", "--requantize", "nf4"]],
    ids=["dense", "onto", "requantize"],
)
@pytest.mark.filterwarnings("ignore:adapter .* was trained beside")
def test_merge_in_each_way(answer: Any, nf4_run: Path, tmp_path: Path, options: list[str]) -> None:
    code, result = answer("merge", nf4_run / "adapter", "-o", tmp_path / "merged", *options)
    assert code == 0, result
    assert ("requantized" in result) is ("--requantize" in options)
    code, result = answer("generate", "1", "--model", tmp_path / "merged", "--max-new-tokens", 4)
    assert code == 0, result


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused on a CPU only")
def test_a_paged_optimizer_is_refused_on_a_cpu(answer: Any, nf4_run: Path, tmp_path: Path) -> None:
    words = ["train.optimizer=paged_adamw", f"output={tmp_path / 'run'}"]
    code, result = answer("train", nf4_run.parent / "config.yaml", *words)
    assert (code, result["error"]["type"]) == (2, "ConfigError")
    assert "unified memory" in result["error"]["what"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (["model.quantize=int4"], "ConfigError", "nf4"),
        (["model.quantize=nf4", "method=full"], "SpecError", "no gradient"),
        (["model.quantize=nf4", "model.dtype=int8"], "", "dtype"),
    ],
)
def test_what_cannot_be_is_refused(
    answer: Any, nf4_run: Path, tmp_path: Path, words: list[str], kind: str, text: str
) -> None:
    config = nf4_run.parent / "config.yaml"
    code, result = answer("train", config, *words, f"output={tmp_path / 'run'}")
    assert code == 2, result
    assert result["error"]["type"] == kind or not kind
    assert text in json.dumps(result["error"])
    assert not (tmp_path / "run").exists()


def lorakit_without(folder: Path, kind: str, *words: object) -> tuple[int, dict[str, Any]]:
    """Run the command line in a process of its own that finds another bitsandbytes, or none."""
    if kind == "missing":
        (folder / "sitecustomize.py").write_text(MISSING)
    else:
        package = folder / "bitsandbytes"
        package.mkdir(parents=True)
        content = BROKEN[kind]
        parts = (content,) if isinstance(content, str) else content
        for name, text in zip(("__init__.py", "functional.py"), parts, strict=False):
            (package / name).write_text(text)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    code = "import sys; from lorakit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--json"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing", "not installed"),
        ("no library", "cannot be imported"),
        ("no kernels", "cannot quantize on this device"),
    ],
)
def test_a_machine_without_4_bits_is_told_what_to_install(
    base: Path, tmp_path: Path, kind: str, text: str
) -> None:
    words = ("generate", "1+2", "--model", base, "--quantize", "nf4")
    code, result = lorakit_without(tmp_path, kind, *words)
    assert (code, result["error"]["type"]) == (2, "ModelError")
    assert text in result["error"]["what"]
    assert "lorakit[quant]" in result["error"]["remedy"]


@pytest.mark.slow
def test_training_and_merging_without_bitsandbytes_leave_nothing_behind(
    data: Path, nf4_run: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words: tuple[object, ...] = ("merge", nf4_run / "adapter", "-o", output, "--requantize", "nf4")
    code, result = lorakit_without(tmp_path, "missing", *words)
    assert (code, result["error"]["type"]) == (2, "ModelError")
    config = nf4_run.parent / "config.yaml"
    words = ("train", config, "model.quantize=nf4", f"output={output}")
    code, result = lorakit_without(tmp_path, "missing", *words)
    assert (code, result["error"]["type"]) == (2, "ModelError")
    assert not output.exists()
