"""The one wrapper: the frozen base, and a branch per adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers.fused import Span, fused_forward, fused_rows, fused_tokens
from lorakit.layers.inference import added_in_place
from lorakit.layers.kinds import LayerKind
from lorakit.layers.low_rank import Branch
from lorakit.layers.routing import Routing, TokenSpans, row_groups, row_spans
from lorakit.weights.storage import base_weight


def module_key(name: str) -> str:
    """An adapter's name as a key of nn.ModuleDict, which forbids dots and its own attributes."""
    return "@" + name.replace(".", "·")


class Wrapper(nn.Module):
    """What stands in the place of a base module, and otherwise looks like it.

    Model code reads attributes of its layers (T5 asks `wo.weight.dtype`, others `in_features`), so
    whatever the wrapper does not have is looked up in the base.
    """

    def __init__(self, base: nn.Module, *, routing: Routing, name: str) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.name = name
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


class AdaptedLayer(Wrapper):
    """h = W0 x + what the row's adapter changes (LoRA: s B A x); forward changes nothing.

    Args:
        base: the frozen layer.
        kind: its geometry.
        routing: which adapter runs, shared by the whole model.
        name: the layer's name in the model.
    """

    def __init__(self, base: nn.Module, *, kind: LayerKind, routing: Routing, name: str) -> None:
        super().__init__(base, routing=routing, name=name)
        self.kind = kind
        self.factors = nn.ModuleDict()

    def branch_of(self, name: str) -> Branch | None:
        """What the adapter `name` does here, or None when it does nothing."""
        # The tables themselves: this runs once per layer and step, and a step may be one token.
        factors = self._modules["factors"]
        branch = None if factors is None else factors._modules.get(module_key(name))
        return branch if isinstance(branch, Branch) else None

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the branch of the adapter that is switched on.

        Args:
            x: what the base takes: (..., in), token ids, or (n, in, H, W).

        Returns:
            What the base returns, same shape and dtype.
        """
        active = self.routing.active
        if isinstance(active, tuple) and not self.routing.merged:
            return self._forward_rows(x, active)
        if active is None or isinstance(active, tuple) or active in self.routing.merged:
            return self.base(x)
        branch = self.branch_of(active)
        if branch is None:
            return self.base(x)
        base = self._modules["base"]
        if base is not None and not torch.is_grad_enabled():
            answered = added_in_place(base, branch, x)
            if answered is not None:
                return answered
        fused = fused_forward(self.base, branch, x)
        return self._add(branch, x, self.base(x)) if fused is None else fused

    def _forward_rows(self, x: Tensor, rows: tuple[str | None, ...]) -> Tensor:
        packed = self.routing.spans
        if packed is not None and x.shape[0] == 1:
            return self._forward_packed(x, packed)
        if x.shape[0] == 1 and len(rows) > 1:
            # Position ids are looked up once for all rows; with an adapter per row they differ.
            x = x.expand(len(rows), *x.shape[1:])
        spans = row_spans(rows, x.shape[0], self.name)
        # Many short stretches are gathered by name instead.
        if len(spans) <= len({name for name, _, _ in spans}):
            found = ((self.branch_of(name), start, stop) for name, start, stop in spans)
            own = [Span(branch, a, b) for branch, a, b in found if branch is not None]
            fused = fused_rows(self.base, own, x) if own else self.base(x)
            if fused is not None:
                return fused
        y = self.base(x)
        for name, indices in row_groups(rows, x.shape[0], self.name).items():
            branch = self.branch_of(name)
            if branch is not None:
                indices = indices.to(y.device)
                y = y.index_copy(0, indices, self._add(branch, x[indices], y[indices]))
        return y

    def _forward_packed(self, x: Tensor, spans: TokenSpans) -> Tensor:
        """The rows of a packed batch (1, tokens, ...), each adapter's tokens in one stretch."""
        found = ((self.branch_of(name), start, stop) for name, start, stop in spans)
        own = [Span(branch, a, b) for branch, a, b in found if branch is not None]
        fused = fused_tokens(self.base, own, x) if own else self.base(x)
        if fused is not None:
            return fused
        y, parts, done = self.base(x), list[Tensor](), 0
        for span in own:
            here = slice(span.start, span.stop)
            parts += [y[:, done : span.start], self._add(span.branch, x[:, here], y[:, here])]
            done = span.stop
        return torch.cat([*parts, y[:, done:]], dim=1)

    def _add(self, branch: Branch, x: Tensor, y: Tensor) -> Tensor:
        total = y
        for update in branch.updates():
            # Every part changes the base's output, not what another part made of it.
            total = total + update.change(self, x, y)
        if branch.bias is not None:
            shift = (branch.bias - self.base.get_parameter("bias")).to(y.dtype)
            total = total + self.kind.per_output(shift)
        return total

    def delta(self, name: str) -> Tensor:
        """The adapter's change of this layer's weight, float32, base layout."""
        branch = self.branch_of(name)
        if branch is None:
            raise KeyError(name)
        weight = base_weight(self.base).read()
        parts = [update.values(self.kind).delta(weight) for update in branch.updates()]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
