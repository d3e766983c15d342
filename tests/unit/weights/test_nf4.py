"""NF4 as the QLoRA paper defines it, and the protocol of BaseWeight over it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorakit.errors import ModelError
from lorakit.weights import nf4
from lorakit.weights.nf4 import (
    BITS_PER_PARAM,
    BLOCK,
    STATISTICS_BLOCK,
    FourBitWeight,
    bitsandbytes,
    four_bit_refusal,
    is_four_bit,
    nf4_levels,
    quantized_linear,
    require_nf4,
    round_trip,
)
from lorakit.weights.storage import base_weight, num_params, storage_of, storage_refusal

# The table of bitsandbytes, as the appendix of the QLoRA paper prints it.
LEVELS = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
CPU = torch.device("cpu")


def layer_of(
    weight: torch.Tensor, *, bias: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Module:
    own = nn.Parameter(torch.randn(weight.shape[0], dtype=dtype)) if bias else None
    return quantized_linear(weight, own, dtype=dtype, device=CPU)


def test_the_levels_follow_from_their_definition() -> None:
    levels = nf4_levels()
    assert levels.shape == (16,)
    torch.testing.assert_close(levels, torch.tensor(LEVELS, dtype=torch.float64), rtol=0, atol=2e-7)
    assert (levels > 0).sum() == 8
    assert (levels < 0).sum() == 7
    assert levels[7] == 0


def test_bitsandbytes_stores_and_reads_these_levels() -> None:
    code = bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(code.double(), nf4_levels(), rtol=0, atol=2e-7)
    # A block of 64 that holds each level four times, under a scale of its own.
    weight = (3.7 * nf4_levels().float()).repeat(4).reshape(1, 64)
    torch.testing.assert_close(round_trip(weight), weight, rtol=1e-6, atol=1e-6)


def test_every_number_goes_to_the_nearest_level_of_its_block() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    weight[0, :64] *= 100  # one block must not disturb its neighbours
    library = bitsandbytes().functional
    packed, state = library.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    torch.testing.assert_close(state.absmax, scales[:, 0])
    levels = nf4_levels().float()
    nearest = levels[(blocks / scales).unsqueeze(-1).sub(levels).abs().argmin(-1)] * scales
    found = library.dequantize_4bit(packed, state)
    torch.testing.assert_close(found.reshape(-1, 64), nearest, rtol=1e-5, atol=1e-6)


def test_a_number_costs_4_127_bits() -> None:
    assert pytest.approx(4.127, abs=5e-4) == BITS_PER_PARAM
    weight = torch.randn(1024, 1536)
    stored = FourBitWeight(layer_of(weight))
    assert 8 * stored.num_bytes() / weight.numel() == pytest.approx(BITS_PER_PARAM, rel=1e-4)
    assert stored.num_bytes() <= 0.30 * 2 * weight.numel()
    parameter, state = stored.keep()
    assert parameter.numel() == weight.numel() // 2
    assert parameter.dtype == torch.uint8
    assert (state.absmax.numel(), state.absmax.dtype) == (weight.numel() // 64, torch.uint8)
    second = state.state2.absmax
    assert (second.numel(), second.dtype) == (weight.numel() // (64 * 256), torch.float32)
    assert state.blocksize == 64
    assert state.state2.blocksize == 256


def test_double_quantization_saves_what_the_paper_says() -> None:
    """Dettmers et al. 2023, section 3: 32/64 = 0.5 bits for scales become 0.127, 0.373 less."""
    assert BLOCK == 64
    assert STATISTICS_BLOCK == 256
    single = 32 / BLOCK
    double = 8 / BLOCK + 32 / (BLOCK * STATISTICS_BLOCK)
    assert single == 0.5
    assert double == pytest.approx(0.127, abs=5e-4)
    assert single - double == pytest.approx(0.373, abs=5e-4)
    assert 4 + double == BITS_PER_PARAM


@pytest.mark.parametrize("shape", [(96, 64), (97, 63), (40, 256), (1, 8191)])
def test_piece_by_piece_gives_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(nf4, "_PIECE", 1024)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    packed, state = bitsandbytes().functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    parameter, ours = FourBitWeight(layer_of(weight)).keep()
    assert parameter.data.equal(packed)
    assert ours.absmax.equal(state.absmax)
    assert ours.offset.equal(state.offset)
    assert ours.state2.absmax.equal(state.state2.absmax)
    for name in ("shape", "blocksize", "quant_type", "nested", "dtype"):
        assert getattr(ours, name) == getattr(state, name), name


def test_double_quantization_costs_little_beyond_the_first() -> None:
    weight = torch.randn(512, 512)
    library = bitsandbytes().functional
    single = library.dequantize_4bit(*library.quantize_4bit(weight, quant_type="nf4", blocksize=64))
    once, twice = (single - weight).norm(), (round_trip(weight) - weight).norm()
    assert once < 0.1 * weight.norm()
    assert twice == pytest.approx(float(once), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(32, 48), (5, 7), (33, 3), (1, 130)])
def test_read_is_what_the_forward_pass_multiplies_by(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Sizes need not be multiples of a block: blocks run over the flattened weight."""
    weight = torch.randn(*shape)
    layer = layer_of(weight, bias=True, dtype=dtype)
    x = torch.randn(4, 3, shape[1], dtype=dtype, requires_grad=True)
    dense = FourBitWeight(layer).read()
    assert dense.dtype == torch.float32
    assert dense.shape == weight.shape
    bias = layer.get_parameter("bias")
    expected = nn.functional.linear(x, dense.to(dtype), bias)
    y = layer(x)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, dense.to(dtype).sum(0).expand_as(x), rtol=5e-2, atol=10 * tolerance
    )


def test_the_4_bit_numbers_do_not_depend_on_the_dtype_computed_in() -> None:
    weight = torch.randn(48, 64).to(torch.bfloat16)
    wide, narrow = layer_of(weight.float()), layer_of(weight, dtype=torch.bfloat16)
    assert wide.get_parameter("weight").data.equal(narrow.get_parameter("weight").data)
    assert FourBitWeight(wide).read().equal(FourBitWeight(narrow).read())


def test_write_quantizes_and_restore_brings_the_very_bits_back() -> None:
    layer = layer_of(torch.randn(32, 48))
    stored = FourBitWeight(layer)
    before, parameter = stored.read(), layer.get_parameter("weight")
    kept, bytes_before = stored.keep(), parameter.detach().clone()
    other = torch.randn(32, 48)
    stored.write(other)
    torch.testing.assert_close(stored.read(), round_trip(other), rtol=0, atol=0)
    x = torch.randn(2, 48)
    torch.testing.assert_close(layer(x), x @ round_trip(other).T)
    stored.restore(kept)
    assert layer.get_parameter("weight") is parameter
    assert parameter.data.equal(bytes_before)
    assert stored.read().equal(before)
    torch.testing.assert_close(layer(x), x @ before.T)


def test_a_forward_pass_in_eval_mode_changes_no_bit() -> None:
    """Left alone, bitsandbytes repacks the weight on CPUs with AVX512-BF16."""
    layer = layer_of(torch.randn(64, 128)).eval()
    before = copy.deepcopy(FourBitWeight(layer).keep())
    with torch.no_grad():
        layer(torch.randn(3, 128))
    parameter, state = FourBitWeight(layer).keep()
    assert parameter.data.equal(before[0].data)
    assert state.absmax.equal(before[1].absmax)
    assert four_bit_refusal(layer) is None


def test_a_repacked_weight_is_refused_by_name() -> None:
    layer = layer_of(torch.randn(64, 128))
    FourBitWeight(layer).keep()[1].packing_format_for_cpu = True  # type: ignore[attr-defined]
    reason = storage_refusal(layer)
    assert reason is not None
    assert "AVX512" in reason


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = torch.randn(8, 8)
    weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        layer_of(weight)


def test_storage_is_told_apart() -> None:
    layer, dense = layer_of(torch.randn(32, 48), bias=True), nn.Linear(48, 32)
    assert is_four_bit(layer)
    assert not is_four_bit(dense)
    assert isinstance(base_weight(layer), FourBitWeight)
    assert not isinstance(base_weight(dense), FourBitWeight)
    assert storage_of([dense, layer]) == "nf4"
    assert storage_of([dense]) == "dense"
    assert num_params(nn.ModuleList([layer, dense])) == 2 * (32 * 48 + 32)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        bitsandbytes()
    assert "lorakit[quant]" in str(caught.value)


def test_a_device_that_does_not_do_what_it_should_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nf4, "nf4_levels", lambda: torch.linspace(-1, 1, 16, dtype=torch.float64))
    require_nf4.cache_clear()
    with pytest.raises(ModelError, match="cannot quantize on this device"):
        require_nf4(CPU)
    monkeypatch.undo()
    require_nf4(CPU)
