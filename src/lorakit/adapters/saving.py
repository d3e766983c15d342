"""`save_pretrained` of a model that carries something learned: what was learned, and nothing else.

The model's own `save_pretrained` would write the wrapped modules under names that no model has
(`q_proj.base.weight`). As in PEFT, and in transformers with PEFT's adapters, only what was learned
is written. transformers' Trainer calls the same function for its checkpoints, and loads them with
`load_state_dict` from a file of a fixed name; both are replaced on the model, not on its class.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys  # pyright: ignore[reportPrivateUsage]

from lorakit.adapters.attachments import attachments_of, find_attachments, outer_modules, places
from lorakit.adapters.extract import adapter_from_model
from lorakit.adapters.state import adapter_state, data_was_seen, load_in_place
from lorakit.errors import LorakitWarning, StateError
from lorakit.files import files_into
from lorakit.layers.adapted import Wrapper

# Trainer names its checkpoints so, and looks for this file in them when it resumes.
_TRAINER_CHECKPOINT = re.compile(r"checkpoint-\d+")
_TRAINER_FILE = "model.safetensors"
# An empty tensor that says: this file holds learned tensors alone. Where nothing is attached,
# Trainer shows it as an unexpected key.
LEARNED_ONLY = "lorakit: learned tensors only; attach the same adapter before resuming"


class Learned(Protocol):
    """What a model carries, as far as saving it goes; `lorakit.methods.base.Method` is one."""

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write a directory that does not exist yet."""
        ...

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The learned tensors by name, live."""
        ...

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put such tensors back, strictly."""
        ...


@runtime_checkable
class _Saves(Protocol):
    def save_pretrained(self, save_directory: str) -> None: ...


def save_learned_only(model: nn.Module, learned: Learned) -> None:
    """Let `model.save_pretrained` write what was learned; mutates the model.

    A model without `save_pretrained` stays as it is.
    """
    if isinstance(model, _Saves):
        vars(model)["save_pretrained"] = SaveLearned(model, learned)
        vars(model)["load_state_dict"] = LoadLearned(model, learned)


def save_whole_again(model: nn.Module) -> None:
    """Give the model back its own `save_pretrained`; mutates it."""
    for name in ("save_pretrained", "load_state_dict"):
        vars(model).pop(name, None)


@dataclass(frozen=True, slots=True)
class SaveLearned:
    """`save_pretrained` of one model.

    Attributes:
        model: the model.
        learned: what it carries.
    """

    model: nn.Module
    learned: Learned

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write what was learned beside what is in the directory; a merged model is written whole.

        In a directory that is named as Trainer names its checkpoints, `model.safetensors` beside
        holds the learned tensors bit for bit, so that Trainer can resume and load its best model.

        Args:
            save_directory: made where it does not exist.
            is_main_process: false in the other processes of a distributed run, which write nothing.
            state_dict: not used: the tensors are the model's.
            push_to_hub: refused.
            options: transformers' other options; they concern a whole model.

        Raises:
            StateError: `push_to_hub`.
            OutputError: the disk refuses.
        """
        if push_to_hub:
            raise StateError(
                "an adapter is not pushed by save_pretrained",
                where="push_to_hub",
                expected="push_to_hub=False",
                remedy="save it, then upload the directory with huggingface_hub.upload_folder",
            )
        if not is_main_process:
            return
        record = find_attachments(self.model)
        if record is not None and record.routing.merged:
            self._save_merged(record.routing.merged, list(record.plans), save_directory, options)
            return
        directory = Path(save_directory)
        with files_into(directory) as staging:
            self.learned.save(self.model, staging / "learned", {})
            if _TRAINER_CHECKPOINT.fullmatch(directory.name):
                self._save_for_trainer(staging / "learned" / _TRAINER_FILE)

    def _save_merged(
        self, merged: list[str], names: list[str], directory: str | Path, options: dict[str, Any]
    ) -> None:
        left = [name for name in names if name not in merged]
        if left:
            warnings.warn(
                f"the model is saved with {', '.join(merged)} merged into it; the files do not "
                f"hold {', '.join(left)}: save_adapter writes it",
                LorakitWarning,
                stacklevel=3,
            )
        with unwrapped(self.model):
            type(self.model).save_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
                self.model, directory, **options
            )

    def _save_for_trainer(self, path: Path) -> None:
        state = self.learned.state(self.model)
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file({LEARNED_ONLY: torch.empty(0), **tensors}, str(path), metadata={"format": "pt"})


@dataclass(frozen=True, slots=True)
class LoadLearned:
    """`load_state_dict` of one model, which also takes what `SaveLearned` wrote for Trainer.

    Attributes:
        model: the model.
        learned: what it carries.
    """

    model: nn.Module
    learned: Learned

    def __call__(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As torch's; learned tensors alone are put back strictly, whatever `strict` says.

        Raises:
            AdapterFileError: the learned tensors are not this model's.
        """
        if LEARNED_ONLY not in state_dict:
            own = type(self.model).load_state_dict
            return own(self.model, state_dict, strict=strict, assign=assign)
        learned = {name: value for name, value in state_dict.items() if name != LEARNED_ONLY}
        self.learned.load(self.model, learned)
        return _IncompatibleKeys([], [])


class AttachedAdapters:
    """All LoRA adapters on a model."""

    def save(self, model: nn.Module, path: Path, passport: Mapping[str, Any]) -> None:
        """Write PEFT's layout: one adapter in the directory itself, several each in its own."""
        names = list(attachments_of(model).plans)
        for name in names:
            adapter = adapter_from_model(model, name, passport=passport)
            adapter.save(path if len(names) == 1 else path / name)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Every adapter's tensors, its name in front."""
        return {
            f"{name}/{own}": value
            for name in attachments_of(model).plans
            for own, value in adapter_state(model, name).items()
        }

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put them back; adapters that wait for data have their start now."""
        load_in_place(self.state(model), state)
        for name in attachments_of(model).plans:
            data_was_seen(model, name)


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Inside the block the base's modules stand in their places; mutates the model meanwhile."""
    holders = places(outer_modules(model))
    wrappers = [module for module in model.modules() if isinstance(module, Wrapper)]
    for wrapper in wrappers:
        for parent, attribute in holders[id(wrapper)]:
            setattr(parent, attribute, wrapper.base)
    try:
        yield
    finally:
        for wrapper in wrappers:
            for parent, attribute in holders[id(wrapper)]:
                setattr(parent, attribute, wrapper)
