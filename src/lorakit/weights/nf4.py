"""A linear layer's weight in 4-bit NormalFloat, as bitsandbytes stores it.

W is cut into blocks of 64 numbers in the order of memory. Each block keeps its largest magnitude c2
and, per number, the index of the nearest of 16 levels of [-1, 1]; the levels are quantiles of a
normal distribution. The c2 are quantized once more (8 bits, blocks of 256, their mean c1 taken off
first), so that a number costs 4 + 8/64 + 32/(64 * 256) = 4.127 bits (Dettmers et al. 2023).
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError

BLOCK = 64
STATISTICS_BLOCK = 256
EXTRA = "pip install 'lorakit[quant]'"
INDEX_BITS = 4
# 4 bits, 8/64 for the scale of a block, 32/(64 * 256) for the scale of 256 scales.
BITS_PER_PARAM = INDEX_BITS + 8 / BLOCK + 32 / (BLOCK * STATISTICS_BLOCK)
_TAIL = 0.9677083
_SOURCE = "_lorakit_source"
_PLANNED = "_lorakit_planned_nf4"
# Numbers quantized at a time, whole blocks: little memory on a CPU, few launches on a device.
_PIECE = 4096 * BLOCK
_PIECE_ON_DEVICE = 64 * _PIECE


class QuantState(Protocol):
    """What bitsandbytes keeps beside the packed indices."""

    shape: torch.Size
    dtype: torch.dtype
    absmax: Tensor
    quant_type: str
    nested: bool
    state2: QuantState
    offset: Tensor
    blocksize: int


@runtime_checkable
class QuantizedLinear(Protocol):
    """bitsandbytes' Linear4bit, as far as it is used here."""

    in_features: int
    out_features: int
    compute_dtype: torch.dtype | None
    quant_state: QuantState | None
    support_avx512bf16_for_cpu: bool


@dataclass(frozen=True, slots=True)
class Source:
    """What a weight was before it was quantized.

    Attributes:
        shape: of the weight in the checkpoint's layout.
        dtype: of the weight in the checkpoint.
        samples: the values that the base's fingerprint takes, bfloat16.
        transposed: whether the checkpoint stores (in, out), as GPT-2's Conv1D does.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    samples: Tensor
    transposed: bool


def nf4_levels() -> Tensor:
    """The 16 levels from their definition, (16,) float64, ascending from -1 to 1.

    Quantiles of N(0, 1) at evenly spaced probabilities, 8 above and 7 below an exact zero, divided
    by the largest (Dettmers et al. 2023, section 3 and appendix E).
    """
    normal = torch.special.ndtri
    positive = normal(torch.linspace(_TAIL, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal(torch.linspace(_TAIL, 0.5, 8, dtype=torch.float64)[:-1])
    zero = torch.zeros(1, dtype=torch.float64)
    levels = torch.cat([negative, zero, positive]).sort().values
    return levels / levels.abs().max()


def bitsandbytes() -> Any:
    """The library, imported quietly.

    Raises:
        ModelError: it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "4-bit weights need bitsandbytes, which is not installed",
            where="quantize",
            remedy=EXTRA,
        )
    try:
        import bitsandbytes as library
    except Exception as error:
        raise ModelError(
            "bitsandbytes is installed and cannot be imported",
            where="quantize",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            remedy=f"install a build for this machine: {EXTRA}, or load the weights dense",
        ) from error
    return library


@cache
def require_nf4(device: torch.device) -> None:
    """Check that 4-bit weights can be stored and read on this device, by doing it once.

    Raises:
        ModelError: bitsandbytes is missing, or does not do on this device what it should.
    """
    library = bitsandbytes()
    probe = nf4_levels().to(torch.float32).repeat(4)
    found = ""
    try:
        packed, state = library.functional.quantize_4bit(
            probe.to(device), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        back = library.functional.dequantize_4bit(packed, state).cpu()
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if not torch.allclose(back, probe, atol=1e-5):
            found = f"values off by up to {float((back - probe).abs().max()):.2g}"
    if found:
        raise ModelError(
            "bitsandbytes cannot quantize on this device",
            where=str(device),
            expected="the 16 levels of NF4, read back as they were stored",
            found=found,
            remedy=f"install a build for this machine: {EXTRA}, or load the weights dense",
        )


def is_four_bit(module: nn.Module) -> bool:
    """Whether the module is bitsandbytes' Linear4bit; does not import bitsandbytes."""
    library = sys.modules.get("bitsandbytes.nn")
    return library is not None and isinstance(module, library.Linear4bit)


def plan_four_bit(module: nn.Module) -> None:
    """Mark a layer without weights: it will be in 4 bits once it is loaded; mutates `module`."""
    vars(module)[_PLANNED] = True


def is_planned_four_bit(module: nn.Module) -> bool:
    """Whether the module's weight is in 4 bits, or will be once the marked model is loaded."""
    return _PLANNED in vars(module) or is_four_bit(module)


def four_bit_refusal(module: nn.Module) -> str | None:
    """Why the 4-bit weight of this very module cannot be read as it was stored, or None."""
    state = _state_of(module)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        return (
            "a forward pass repacked its weight for AVX512 and rounded its scales; "
            "load the base with load_model(..., quantize='nf4'), which never does"
        )
    return None


def quantized_linear(
    weight: Tensor, bias: nn.Parameter | None, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A linear layer with this weight in NF4 with double quantization.

    Args:
        weight: (out, in), any floating dtype; it is quantized from its float32 values, so that the
            4-bit numbers do not depend on the dtype computed in.
        bias: (out,) or None; kept dense.
        dtype: what products are computed in; the weight is multiplied out to it.
        device: where to.

    Raises:
        ModelError: see `require_nf4`; or a value is not finite.
    """
    library = bitsandbytes()
    out_features, in_features = weight.shape
    with torch.device("meta"):
        layer = library.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
    layer.bias = bias
    store(layer, weight, dtype=dtype, device=device)
    return layer


def store(layer: nn.Module, weight: Tensor, *, dtype: torch.dtype, device: torch.device) -> None:
    """Quantize `weight` (out, in) into an existing Linear4bit; mutates `layer`.

    Raises:
        ModelError: a value is not finite.
    """
    layer.register_parameter("weight", packed_parameter(weight, layer, dtype, device))
    settle(layer)


def packed_parameter(
    weight: Tensor, layer: nn.Module, dtype: torch.dtype, device: torch.device
) -> nn.Parameter:
    """The Params4bit of a dense weight (out, in), quantized from its float32 values.

    Args:
        weight: (out, in), any floating dtype.
        layer: the Linear4bit it is for; told of the new quantization state.
        dtype: what it will be multiplied out to.
        device: where to.

    Raises:
        ModelError: a value is not finite.
    """
    library = bitsandbytes()
    packed, scales = _quantized_blocks(weight.detach(), device)
    offset = scales.mean()
    second, state2 = library.functional.quantize_blockwise(
        scales - offset, blocksize=STATISTICS_BLOCK
    )
    state = library.functional.QuantState(
        absmax=second,
        shape=weight.shape,
        code=library.functional.get_4bit_type("nf4", device=device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=state2,
    )
    cast(QuantizedLinear, layer).quant_state = state
    return library.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
    )


def _quantized_blocks(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Packed indices (numbers / 2 rounded up, 1) uint8, and the scale of each block, float32.

    Blocks do not touch each other, so a weight is taken piece by piece: bitsandbytes' CPU code
    needs over 16 bytes beside each number that it quantizes at once.
    """
    flat = weight.reshape(-1)
    packed = torch.empty((len(flat) + 1) // 2, 1, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=device)
    size = _PIECE if device.type == "cpu" else _PIECE_ON_DEVICE
    for start in range(0, len(flat), size):
        piece = flat[start : start + size].to(device=device, dtype=torch.float32)
        if not bool(torch.isfinite(piece).all()):
            raise ModelError("a weight is not finite and cannot be quantized")
        indices, state = bitsandbytes().functional.quantize_4bit(
            piece, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        packed[start // 2 : start // 2 + len(indices)] = indices
        scales[start // BLOCK : start // BLOCK + len(state.absmax)] = state.absmax
    return packed, scales


def round_trip(weight: Tensor) -> Tensor:
    """What NF4 makes of a dense weight (out, in): quantized and multiplied out, float32, on CPU.

    Raises:
        ModelError: bitsandbytes is missing, or a value is not finite.
    """
    with torch.device("meta"):
        layer = bitsandbytes().nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
    store(layer, weight, dtype=torch.float32, device=torch.device("cpu"))
    return FourBitWeight(layer).read()


def settle(module: nn.Module) -> None:
    """Keep bitsandbytes from repacking the weight of a Linear4bit; mutates `module`.

    On CPUs with AVX512-BF16 its forward pass in eval mode replaces the weight by another layout,
    with scales rounded to bfloat16, and computes in bfloat16 whatever the compute dtype. It fails
    for sizes that are not multiples of 32, and the stored bits are gone.
    """
    cast(QuantizedLinear, module).support_avx512bf16_for_cpu = False


def keep_as_bytes(module: nn.Module) -> None:
    """View the packed indices of a Linear4bit as bytes, no bit changed; mutates `module`.

    Other tools may store them as floats (`bnb_4bit_quant_storage`, for FSDP): those would be
    rounded by the first cast to another dtype, and are numbers of nothing.
    """
    parameter = module.get_parameter("weight")
    if parameter.dtype != torch.uint8:
        parameter.data = parameter.detach().as_subclass(Tensor).view(torch.uint8).reshape(-1, 1)
    for holder in (module, parameter):
        vars(holder)["quant_storage"] = torch.uint8


def remember_source(module: nn.Module, source: Source) -> None:
    """Keep with a quantized layer what its weight was; mutates `module`."""
    module.__dict__[_SOURCE] = source


def source_of(module: nn.Module) -> Source | None:
    """What the layer's weight was before it was quantized, where that is known."""
    found = module.__dict__.get(_SOURCE)
    return found if isinstance(found, Source) else None


class FourBitWeight:
    """The weight of a bitsandbytes Linear4bit, behind the protocol of `BaseWeight`.

    `write` quantizes anew and leaves the old parameter untouched, so `restore` brings back its very
    bits.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def read(self) -> Tensor:
        """The weight multiplied out, (out, in) float32, without rounding to the compute dtype."""
        parameter, state = self._stored()
        wide = copy.copy(state)
        wide.dtype = torch.float32
        data = parameter.detach().as_subclass(Tensor)
        return bitsandbytes().functional.dequantize_4bit(data, cast(Any, wide))

    def write(self, weight: Tensor) -> None:
        """Store `weight` (out, in), quantized to NF4 with double quantization."""
        parameter, state = self._stored()
        store(self._module, weight, dtype=state.dtype, device=parameter.device)

    def keep(self) -> tuple[nn.Parameter, QuantState]:
        """The present parameter and its scales."""
        return self._stored()

    def restore(self, kept: object) -> None:
        """Put the kept parameter back."""
        parameter, state = cast(tuple[nn.Parameter, QuantState], kept)
        self._module.register_parameter("weight", parameter)
        cast(QuantizedLinear, self._module).quant_state = state

    def kept_bytes(self) -> int:
        """Size of the original that stays beside the written one, in bytes."""
        return self.num_bytes()

    def num_bytes(self) -> int:
        """What is stored, in bytes: packed indices, scales, scales of scales and their mean.

        The two look-up tables that bitsandbytes keeps per layer (16 and 256 numbers, the same for
        every layer) are not counted.
        """
        parameter, state = self._stored()
        tensors = [parameter.detach(), state.absmax]
        if state.nested:
            tensors += [state.state2.absmax, state.offset]
        return sum(t.numel() * t.element_size() for t in tensors)

    def dtype(self) -> torch.dtype:
        """What the weight is multiplied out to, and computed in."""
        computed = cast(QuantizedLinear, self._module).compute_dtype
        return self._stored()[1].dtype if computed is None else computed

    def storage(self) -> str:
        """The name of the data type: nf4 (or fp4, in what other tools stored)."""
        return self._stored()[1].quant_type

    def is_nested(self) -> bool:
        """Whether the scales are quantized too (double quantization)."""
        return self._stored()[1].nested

    def _stored(self) -> tuple[nn.Parameter, QuantState]:
        parameter, state = self._module.get_parameter("weight"), _state_of(self._module)
        if state is None:
            raise ModelError(
                "the 4-bit layer holds no quantized weight yet",
                where=type(self._module).__name__,
                remedy="load the model with load_model(..., quantize='nf4')",
            )
        return parameter, state


def _state_of(module: nn.Module) -> QuantState | None:
    state = vars(module.get_parameter("weight")).get("quant_state")
    return state if state is not None else cast(QuantizedLinear, module).quant_state
