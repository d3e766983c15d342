"""Which positions reach a model's output head, and what it was given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(slots=True)
class Selection:
    """What the hooks were asked to keep, and what they saw.

    With `catch` the head gets no position at all, and the hidden states stay here.
    """

    mask: Tensor
    catch: bool = False
    num_calls: int = 0
    fits: bool = True
    hidden: Tensor | None = None
    output: Tensor | None = None

    def before(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The head's arguments in place of `args`, whose first is (batch, positions, hidden)."""
        self.num_calls += 1
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != self.mask.shape:
            # The model moved its positions (a prefix, a reshape): leave it alone, use it whole.
            self.fits = False
            return args
        chosen = hidden[self.mask.to(hidden.device)]
        if self.catch:
            self.hidden = chosen
            chosen = chosen[:0].detach()
        # A leading dimension of 1 keeps the (batch, positions, hidden) layout models rely on.
        return (chosen.unsqueeze(0), *args[1:])

    def after(self, output: Any) -> None:
        """Take note of what the head gave."""
        self.output = output if isinstance(output, Tensor) else None


class HeadWatch:
    """The hooks on a head, which may run in several threads at once: each has its selection.

    Args:
        head: the output head; it has hooks inside `lead` alone.
    """

    def __init__(self, head: nn.Module) -> None:
        self._head = head
        self._lock = Lock()
        self._selections: dict[int, Selection] = {}
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def lead(self, selection: Selection) -> Iterator[None]:
        """Inside the block, this thread's calls of the head go through the selection."""
        with self._lock:
            self._selections[get_ident()] = selection
            if len(self._selections) == 1:
                self._handles = [
                    self._head.register_forward_pre_hook(self._before),
                    self._head.register_forward_hook(self._after),
                ]
        try:
            yield
        finally:
            with self._lock:
                del self._selections[get_ident()]
                if not self._selections:
                    for handle in self._handles:
                        handle.remove()

    def _before(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self._selections[get_ident()].before(args)

    def _after(self, _head: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._selections[get_ident()].after(output)
