"""What all tests share: tiny random models of every architecture, and the two real ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Quiet and offline before any library reads these: no test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
# So that every test module can `import tiny_models`.
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import tiny_models
from lorakit.errors import ModelError
from lorakit.models.load import load_model
from lorakit.models.resolve import resolve_model


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: sums have one order, and tiny models run faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The converted SmolLM2-135M-Instruct: a directory with safetensors."""
    return _directory("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The MiniLM encoder: a directory with safetensors."""
    return _directory("minilm-l6-v2")


@pytest.fixture(scope="session")
def _loaded_smollm2(smollm2_path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(smollm2_path)


@pytest.fixture
def smollm2(
    _loaded_smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """The real model, loaded once for the whole session: a test gives it back as it found it.

    Detach what you attach, unmerge what you merge; the check after the test says so if you forget.
    """
    model, tokenizer = _loaded_smollm2
    before = _shape_of(model)
    yield model, tokenizer
    assert _shape_of(model) == before, "the test left the shared SmolLM2 changed: detach, unmerge"
    model.eval()
    # Attaching freezes the base; the next test starts from what load_model gives.
    model.requires_grad_(True)
    model.zero_grad(set_to_none=True)


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """tiny("llama"): a fresh tiny random model in eval mode; see tests/tiny_models.py."""
    return tiny_models.build


def _directory(name: str) -> Path:
    try:
        return resolve_model(name).path
    except ModelError as error:
        if "not installed" in error.what:
            pytest.skip(f"{error.what}: {error.remedy}")
        raise


def _shape_of(model: PreTrainedModel) -> list[tuple[str, int, float]]:
    """Name, identity and a sampled sum of every tensor: any adapter or merge changes one."""
    return [
        (name, id(parameter), float(parameter.detach().flatten()[::997].double().sum()))
        for name, parameter in model.named_parameters()
    ]
