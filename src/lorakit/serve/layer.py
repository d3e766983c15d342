"""The wrapper of a served layer: the base's product once, and what each row's adapter adds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.attachments import find_attachments, outer_modules, places
from lorakit.adapters.targets import base_modules
from lorakit.errors import StateError
from lorakit.layers.adapted import Wrapper
from lorakit.layers.routing import Routing, TokenRouting
from lorakit.serve.prepack import Prepacked


@dataclass
class ServedRouting:
    """What the served layers of one model do now.

    Attributes:
        body: for every layer but the output head.
        head: for the output head, which is asked for some positions only.
    """

    body: TokenRouting = field(default_factory=TokenRouting)
    head: TokenRouting = field(default_factory=TokenRouting)


class ServedLayer(Wrapper):
    """y = W0 x + b for all rows at once, then each row's own change in place."""

    def __init__(
        self, base: nn.Module, *, served: ServedRouting, name: str, is_head: bool = False
    ) -> None:
        super().__init__(base, routing=Routing(), name=name)
        self.served = served
        self.is_head = is_head
        self.is_lookup = isinstance(base, nn.Embedding)

    def forward(self, x: Tensor) -> Tensor:
        """The base's output with each row's change.

        Args:
            x: what the base takes; its leading axes hold the batch's entries in order.
        """
        routing = self._routing_of(x)
        if routing.empty:
            return self.base(x)
        padded_rows = len(routing.order) if routing.num_entries is None else 0
        if self.is_lookup and x.shape[0] == 1 and padded_rows > 1:
            # Position ids are looked up once for all rows; with an adapter per row they differ.
            x = x.expand(padded_rows, *x.shape[1:])
        return routing.add(self.name, x, self.base(x), ids=self.is_lookup)

    def _routing_of(self, x: Tensor) -> TokenRouting:
        """The head's where this is the head, or a layer beside it that sees what the head sees."""
        body, head = self.served.body, self.served.head
        if self.is_head:
            return head
        if body.num_entries is None or body.num_entries == head.num_entries:
            return body
        num_entries = x.numel() if self.is_lookup else x.numel() // x.shape[-1]
        return head if num_entries == head.num_entries else body


class ServedModel:
    """A base whose layers are wrapped when the first adapter needs them.

    Args:
        model: a base with nothing attached; changed by `wrap` and `prepack` until `unwrap`.

    Attributes:
        routing: which factors belong to which entries, set for every forward pass.

    Raises:
        StateError: something is attached to the model already.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if find_attachments(model) or any(isinstance(m, Wrapper) for m in model.modules()):
            raise StateError(
                "something is attached to this model already",
                where=type(model).__name__,
                remedy="detach it, or load the base afresh: the engine takes adapters from files",
            )
        self.model = model
        self.routing = ServedRouting()
        self._modules = base_modules(model)
        self._places = places(outer_modules(model))
        self._wrapped: dict[str, ServedLayer] = {}
        self._prepacked: Prepacked | None = None

    def prepack(self) -> None:
        """Compute large layers from copies of their weights until `unwrap`: see `Prepacked`."""
        if self._prepacked is None:
            self._prepacked = Prepacked(self.model)

    def wrap(self, names: Iterable[str]) -> None:
        """Wrap the layers that are not wrapped yet; not while a forward pass runs."""
        for name in names:
            if name in self._wrapped:
                continue
            base = self._modules[name]
            layer = ServedLayer(
                base, served=self.routing, name=name, is_head=base is self._output_head()
            )
            self._wrapped[name] = layer
            for parent, attribute in self._places[id(base)]:
                setattr(parent, attribute, layer)

    def unwrap(self) -> None:
        """Put the very modules back that were there before, and let copies of weights go."""
        for layer in self._wrapped.values():
            for parent, attribute in self._places[id(layer.base)]:
                setattr(parent, attribute, layer.base)
        self._wrapped = {}
        if self._prepacked is not None:
            self._prepacked.undo()
            self._prepacked = None

    @contextmanager
    def routed(self, body: TokenRouting, head: TokenRouting) -> Iterator[None]:
        """Run with these routings inside the block, on the base alone after it."""
        self.routing.body, self.routing.head = body, head
        try:
            yield
        finally:
            self.routing.body = self.routing.head = TokenRouting()

    def _output_head(self) -> nn.Module | None:
        head = self.model.get_output_embeddings()
        return head.base if isinstance(head, ServedLayer) else head
