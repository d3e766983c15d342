"""The form in which adapters are served: per layer y + A B, and an affine change of y for DoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lorakit.adapters.adapter import Adapter, Factors
from lorakit.adapters.bind import plan_binding
from lorakit.adapters.parameters import (
    fit_parameters,
    stacked_parameters,
    tokens_as_factors,
)
from lorakit.adapters.renamed import under_its_names
from lorakit.adapters.targets import base_modules
from lorakit.errors import AdapterFileError
from lorakit.layers.kinds import KINDS, as_matrix, embedding_scale
from lorakit.layers.low_rank import take_rows
from lorakit.math.dora import gain, row_norms
from lorakit.weights.storage import base_weight


@dataclass(frozen=True, slots=True)
class ServedSite:
    """What one adapter does at one layer: y' = y + gain * y + shift + B^T A x.

    Attributes:
        A: (r, in); for an embedding (vocabulary, r), so that a look-up reads one row.
        B: (r, out), all scalings inside.
        gain: (out,) DoRA's g - 1, or None.
        shift: (out,) a trained bias less the base's, and what keeps the base's bias out of the
            gain; or None.
        embedding: the layer is a look-up.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    shift: Tensor | None = None
    embedding: bool = False

    @property
    def r(self) -> int:
        """The rank, the parts of a fused layer added up."""
        return self.B.shape[0]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [t for t in (self.A, self.B, self.gain, self.shift) if t is not None]


@dataclass(frozen=True, slots=True, eq=False)
class ServedAdapter:
    """One adapter, or an exact weighted sum of adapters, ready to be served.

    Attributes:
        key: the hash of its content, or of the parts' and their weights.
        sites: module -> what is done there.
    """

    key: str
    sites: Mapping[str, ServedSite]

    @property
    def r(self) -> int:
        """The highest rank at any layer."""
        return max((site.r for site in self.sites.values()), default=0)

    @property
    def affine(self) -> bool:
        """Whether any layer's output is scaled or shifted (DoRA, trained biases)."""
        return any(s.gain is not None or s.shift is not None for s in self.sites.values())

    def num_bytes(self) -> int:
        """Memory of its tensors."""
        tensors = [t for site in self.sites.values() for t in site.tensors()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self, device: torch.device) -> ServedAdapter:
        """A copy on the device, or itself when it is there already."""
        if all(t.device == device for s in self.sites.values() for t in s.tensors()):
            return self
        moved = {
            name: replace(
                site,
                A=site.A.to(device),
                B=site.B.to(device),
                gain=None if site.gain is None else site.gain.to(device),
                shift=None if site.shift is None else site.shift.to(device),
            )
            for name, site in self.sites.items()
        }
        return replace(self, sites=moved)


def served_form(model: nn.Module, adapter: Adapter, key: str) -> ServedAdapter:
    """Check that an adapter binds to the model, and bring it into the form that is served.

    LoRA's s goes into B. DoRA, W' = m (W0 + s B A) / ||W0 + s B A||, is the exact affine form
    y' - b = g (W0 x + s B A x) with g = m / ||W0 + s B A||: a gain on the base's own output beside
    a low-rank product. Changes nothing.

    Args:
        model: the base; adapters may be served on it at the time.
        adapter: what to serve.
        key: the hash of its content.

    Returns:
        Tensors on the CPU in the dtypes of the layers they act on.

    Raises:
        AdapterFileError: it does not bind, or changes more than a served adapter can.
    """
    modules = base_modules(model)
    adapter = under_its_names(model, modules, adapter)
    fitted, problems = fit_parameters(modules, adapter)
    if not problems:
        adapter = tokens_as_factors(modules, fitted)
    _refuse_unservable(adapter)
    # What a layer with 4-bit weights computes in is what the rest of the model is in.
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    bound = plan_binding(model, adapter)
    sites: dict[str, ServedSite] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, parts in bound.modules().items():
            bias = adapter.biases.get(name)
            sites[name] = _served_site(modules[name], list(parts.values()), bias, dtype)
    return ServedAdapter(key, sites)


def refuse_layers(served: ServedAdapter, closed: Collection[str]) -> None:
    """Refuse an adapter of layers that do not see the batch's rows in their order.

    Args:
        served: the adapter.
        closed: those layers: see `lorakit.serve.probe`.

    Raises:
        AdapterFileError: names some of them.
    """
    inside = [name for name in served.sites if name in closed]
    if inside:
        raise AdapterFileError(
            "this adapter cannot share a batch with others",
            found=f"it changes {len(inside)} layers that see the tokens of all rows in an order of "
            f"their own, as experts do: {', '.join(inside[:3])}",
            expected="layers that see a batch's rows in their order",
            remedy="merge it into the base and serve the merged model: lorakit merge",
        )


def _refuse_unservable(adapter: Adapter) -> None:
    reason = None
    if adapter.overrides:
        some = ", ".join(sorted({name.rpartition(".")[0] for name in adapter.overrides})[:4])
        reason = f"it trained whole modules beside its factors: {some}"
    elif stacked_parameters(adapter):
        some = ", ".join(list(stacked_parameters(adapter))[:4])
        reason = f"it changes parameters that are no layer of their own (target_parameters): {some}"
    elif not adapter.factors and not adapter.tokens:
        reason = "it has no low-rank factors"
    elif any(f.kind == "conv2d" for f in adapter.factors.values()):
        reason = "it adapts convolutions"
    if reason is not None:
        raise AdapterFileError(
            "this adapter cannot share a batch with others",
            found=reason,
            expected="low-rank factors (LoRA or DoRA) and biases of linear layers and embeddings",
            remedy="merge it into the base and serve the merged model: lorakit merge",
        )


def _served_site(
    base: nn.Module, parts: Sequence[Factors], bias: Tensor | None, dtype: torch.dtype
) -> ServedSite:
    weight = base.get_parameter("weight")
    embedding = parts[0].kind == "embedding"
    columns: list[Tensor] = []
    gains: list[Tensor] = []
    for part in parts:
        scaled = part.B.float() * part.scaling
        if part.magnitude is not None:
            less_one = _gain_less_one(base, part)
            scaled = scaled * (less_one + 1)[:, None]
            gains.append(less_one if part.rows is None else part.rows.spread(less_one))
        columns.append(scaled if part.rows is None else part.rows.spread(scaled.T).T)
    first, second = torch.cat([part.A.float() for part in parts]), torch.cat(columns, dim=1).T
    scale = embedding_scale(base) if embedding else None
    if scale is not None:
        second = second * torch.as_tensor(scale).float().cpu()
    gain_sum = torch.stack(gains).sum(0) if gains else None
    shift = _shift(base, parts[0].kind, gain_sum, bias)
    dtype = weight.dtype if weight.is_floating_point() else dtype

    def stored(t: Tensor) -> Tensor:
        return t.to("cpu", dtype).contiguous()

    return ServedSite(
        A=stored(first.T if embedding else first),
        B=stored(second),
        gain=None if gain_sum is None else stored(gain_sum),
        shift=None if shift is None else stored(shift),
        embedding=embedding,
    )


def _gain_less_one(base: nn.Module, part: Factors) -> Tensor:
    assert part.magnitude is not None
    matrix = as_matrix(KINDS[part.kind], base_weight(base).read()).cpu()
    norms = row_norms(
        take_rows(matrix, part.rows), part.A.flatten(1), part.B.flatten(1), part.scaling
    )
    return gain(part.magnitude.float(), norms) - 1


def _shift(
    base: nn.Module, kind: str, whole_gain: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    own = KINDS[kind].bias(base)
    if own is None or (bias is None and whole_gain is None):
        return None
    own = own.detach().float().cpu()
    shift = torch.zeros_like(own) if bias is None else bias.float() - own
    # The gain multiplies y = W0 x + b; DoRA leaves b alone.
    return shift if whole_gain is None else shift - whole_gain * own


def weighted_sum(parts: Sequence[tuple[ServedAdapter, float]], key: str) -> ServedAdapter:
    """The adapter whose change of every layer is the weighted sum of the parts' changes, exactly.

    Ranks are concatenated: sum_i w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...].

    Args:
        parts: adapters and their weights.
        key: identifies the sum.
    """
    names = dict.fromkeys(name for adapter, _ in parts for name in adapter.sites)
    sites: dict[str, ServedSite] = {}
    for name in names:
        here = [(a.sites[name], w) for a, w in parts if name in a.sites]
        embedding = here[0][0].embedding
        sites[name] = ServedSite(
            A=torch.cat([site.A for site, _ in here], dim=1 if embedding else 0),
            B=torch.cat([site.B * weight for site, weight in here]),
            gain=_total([(site.gain, weight) for site, weight in here]),
            shift=_total([(site.shift, weight) for site, weight in here]),
            embedding=embedding,
        )
    return ServedAdapter(key, sites)


def _total(terms: Sequence[tuple[Tensor | None, float]]) -> Tensor | None:
    known = [value * weight for value, weight in terms if value is not None]
    return torch.stack(known).sum(0) if known else None
