"""Which base an adapter was made on: a fingerprint that holds across load dtypes.

A few values are sampled from every parameter at fixed places, rounded to bfloat16, and hashed with
the names and shapes. float32 and bfloat16 loads of one checkpoint give the same bytes. float16 may
round a value twice, so its samples are compared with a tolerance instead.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.adapters.targets import bare_model, base_modules
from lorakit.weights.nf4 import FourBitWeight, is_four_bit, source_of

SAMPLES_PER_TENSOR = 16
_FLOAT16_SMALLEST_NORMAL = 2.0**-14
_BF16_STEP = 2.0**-7


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The identity of a base model.

    Attributes:
        sha256: of names, shapes and samples.
        layout_sha256: of names and shapes alone.
        num_tensors: parameters that were sampled.
        left_out: modules whose parameters do not count (heads that are trained beside).
        dtype: the dtype most parameters had.
        samples: bfloat16 values, base64.
    """

    sha256: str
    layout_sha256: str
    num_tensors: int
    left_out: tuple[str, ...]
    dtype: str
    samples: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sha256": self.sha256,
            "layout_sha256": self.layout_sha256,
            "num_tensors": self.num_tensors,
            "left_out": list(self.left_out),
            "dtype": self.dtype,
            "samples": self.samples,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fingerprint:
        """Read plain values; a missing key is a KeyError."""
        if not isinstance(values["samples"], str):
            raise ValueError("samples must be text")
        return cls(
            sha256=str(values["sha256"]),
            layout_sha256=str(values["layout_sha256"]),
            num_tensors=int(values["num_tensors"]),
            left_out=tuple(values["left_out"]),
            dtype=str(values["dtype"]),
            samples=str(values["samples"]),
        )

    def difference(self, other: Fingerprint) -> str | None:
        """Why the two are not the same base, in a few words, or None when they are."""
        if self.sha256 == other.sha256:
            return None
        if self.layout_sha256 != other.layout_sha256:
            return f"other layers or shapes ({self.num_tensors} and {other.num_tensors} tensors)"
        mine, theirs = self._values(), other._values()
        if "float16" in (self.dtype, other.dtype) and _close(mine, theirs):
            return None
        share = float((mine != theirs).double().mean())
        return f"same layers, other weights ({share:.0%} of the sampled values differ)"

    def _values(self) -> Tensor:
        data = bytearray(base64.b64decode(self.samples))
        return torch.frombuffer(data, dtype=torch.bfloat16).float()


def fingerprint(model: nn.Module, *, left_out: Sequence[str] = ()) -> Fingerprint:
    """Sample the base's parameters; under a second per gigabyte, changes nothing.

    Args:
        model: with or without adapters attached (none merged). A weight that `load_model` quantized
            counts as what it was before; one that was quantized elsewhere as what it is now.
        left_out: modules whose parameters do not count.
    """
    return fingerprint_of(_base_parameters(bare_model(model), tuple(left_out)), left_out=left_out)


def fingerprint_of(samples: Iterable[Sampled], *, left_out: Sequence[str] = ()) -> Fingerprint:
    """The fingerprint of parameters that were sampled one by one.

    Args:
        samples: one per parameter of the base, in any order.
        left_out: modules whose parameters are not among them.
    """
    layout = hashlib.sha256()
    chunks: list[Tensor] = []
    dtypes: dict[str, int] = {}
    for one in sorted(samples, key=lambda one: one.name):
        layout.update(f"{one.name}{one.shape}\n".encode())
        dtype = str(one.dtype).removeprefix("torch.")
        dtypes[dtype] = dtypes.get(dtype, 0) + math.prod(one.shape)
        chunks.append(one.samples)
    values = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.bfloat16)
    data = values.view(torch.uint8).numpy().tobytes() if len(values) else b""
    whole = hashlib.sha256(layout.digest() + data)
    return Fingerprint(
        sha256=whole.hexdigest(),
        layout_sha256=layout.hexdigest(),
        num_tensors=len(chunks),
        left_out=tuple(left_out),
        dtype=max(dtypes, key=lambda d: dtypes[d]) if dtypes else "none",
        samples=base64.b64encode(data).decode(),
    )


class Sampled(NamedTuple):
    """What counts of one parameter.

    Attributes:
        name: the parameter.
        shape: its shape.
        dtype: as it is stored.
        samples: see `sample`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    samples: Tensor


def _base_parameters(model: nn.Module, left_out: tuple[str, ...]) -> Iterator[Sampled]:
    seen: set[int] = set()
    for module_name, module in base_modules(model).items():
        if any(module_name == skip or module_name.startswith(skip + ".") for skip in left_out):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full_name = f"{module_name}.{name}" if module_name else name
            if name == "weight" and is_four_bit(module):
                yield _before_quantization(full_name, module)
            elif parameter.is_floating_point():
                shape = tuple(parameter.shape)
                yield Sampled(full_name, shape, parameter.dtype, sample(parameter))


def _before_quantization(name: str, module: nn.Module) -> Sampled:
    source = source_of(module)
    if source is not None:
        return Sampled(name, source.shape, source.dtype, source.samples)
    weight = FourBitWeight(module).read()
    return Sampled(name, tuple(weight.shape), weight.dtype, sample(weight))


def sample(parameter: Tensor) -> Tensor:
    """The values of one parameter that count, (up to 16,) bfloat16 on the CPU."""
    flat = parameter.detach().reshape(-1)
    return flat[_places(len(flat)).to(flat.device)].to(torch.bfloat16).cpu()


@lru_cache(maxsize=4096)
def _places(size: int) -> Tensor:
    """Where a tensor of so many numbers is looked at; asked for again at every load."""
    count = min(SAMPLES_PER_TENSOR, size)
    # Spread over the tensor and off its regular grid, so that rows and columns are both visited.
    places = [(i * size) // count + (i * 7919) % max(1, size // count) for i in range(count)]
    return torch.tensor(places, dtype=torch.long, device="cpu")


def _close(a: Tensor, b: Tensor) -> bool:
    tiny = (a.abs() < _FLOAT16_SMALLEST_NORMAL) & (b.abs() < 2 * _FLOAT16_SMALLEST_NORMAL)
    near = (a - b).abs() <= _BF16_STEP * torch.maximum(a.abs(), b.abs())
    return bool((tiny | near).all())
