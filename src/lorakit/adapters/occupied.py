"""Which method other than LoRA a model carries: nothing may be put beside it."""

from __future__ import annotations

from torch import nn

from lorakit.errors import StateError

_MARK = "_lorakit_method"
# Their learned values become the base by merging; the others have no form in its weights.
_FOLDS = frozenset({"full", "last_layers", "bitfit"})


def occupy(model: nn.Module, method: str) -> None:
    """Note that a method other than LoRA is on the model; mutates it."""
    model.__dict__[_MARK] = method


def vacate(model: nn.Module) -> None:
    """Note that what the method learned is the model's own from now on; mutates it."""
    model.__dict__.pop(_MARK, None)


def refuse_occupied(model: nn.Module, newcomer: str) -> None:
    """Refuse to put anything beside a method other than LoRA; changes nothing.

    Args:
        model: what the newcomer would be put on.
        newcomer: a method's name.

    Raises:
        StateError: a method other than LoRA is on the model.
    """
    method = model.__dict__.get(_MARK)
    if isinstance(method, str):
        fold = " or fold it in with its merge(model)" if method in _FOLDS else ""
        raise StateError(
            f"{newcomer} cannot be attached beside {method}: it would freeze what {method} learns, "
            f"and learn on a base that {method} changes",
            where=type(model).__name__,
            found=f"a model with {method} on it",
            remedy=f"load the base model afresh{fold}",
        )
