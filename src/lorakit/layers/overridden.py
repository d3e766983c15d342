"""Parameters that an adapter replaces as a whole: biases, and modules trained beside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lorakit.errors import StateError
from lorakit.layers.adapted import Wrapper, module_key
from lorakit.layers.routing import Routing, row_groups


class Override(nn.Module):
    """One adapter's own values for some parameters of a module.

    Args:
        values: parameter name inside the module (may have dots) -> tensor of the same shape.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = nn.ParameterDict(
            {module_key(name): nn.Parameter(value) for name, value in values.items()}
        )
        self._names = {name: module_key(name) for name in values}

    def tensors(self) -> dict[str, Tensor]:
        """Parameter name inside the module -> the adapter's value, as it is stored."""
        return {name: self.values[key] for name, key in self._names.items()}

    def cast_like(self, base: nn.Module) -> dict[str, Tensor]:
        """The same in the dtypes of the base's parameters, to run in their place."""
        return {n: v.to(base.get_parameter(n).dtype) for n, v in self.tensors().items()}


class OverriddenModule(Wrapper):
    """A module that runs with the active adapter's values; forward changes nothing."""

    def __init__(self, base: nn.Module, *, routing: Routing, name: str) -> None:
        super().__init__(base, routing=routing, name=name)
        self.overrides = nn.ModuleDict()

    def override_of(self, name: str) -> Override | None:
        """The adapter's values here, or None when it has none."""
        key = module_key(name)
        override = self.overrides[key] if key in self.overrides else None  # noqa: SIM401
        return override if isinstance(override, Override) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the base takes and returns."""
        active = self.routing.active
        merged = self.routing.merged
        if isinstance(active, tuple) and not merged:
            return self._forward_rows(active, args, kwargs)
        override = None
        if isinstance(active, str) and active not in merged:
            override = self.override_of(active)
        if override is None:
            return self.base(*args, **kwargs)
        return functional_call(self.base, override.cast_like(self.base), args, kwargs)

    def _forward_rows(
        self, rows: tuple[str | None, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if len(args) != 1 or not isinstance(args[0], Tensor) or kwargs:
            raise StateError(
                "a module trained beside must take one tensor to run one adapter per row",
                where=self.name,
                remedy="run these rows one adapter at a time",
            )
        x = args[0]
        if x.shape[0] == 1 and len(rows) > 1:
            x = x.expand(len(rows), *x.shape[1:])
        y = self.base(x)
        for name, indices in row_groups(rows, x.shape[0], self.name).items():
            override = self.override_of(name)
            if override is not None:
                indices = indices.to(y.device)
                values = override.cast_like(self.base)
                part = functional_call(self.base, values, (x[indices],))
                y = y.index_copy(0, indices, part)
        return y
