"""Quantize a model while it is read: tensor by tensor, never a dense copy of the whole.

transformers reads, renames and places the tensors one at a time; what is registered here turns the
weight of a linear layer into NF4 before the next one is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from lorakit.adapters.fingerprint import sample
from lorakit.environment import return_freed_memory
from lorakit.errors import ModelError
from lorakit.formatting import format_bytes, format_count
from lorakit.models.memory import require_memory
from lorakit.models.quantizable import (
    estimate_nf4_bytes,
    kept_wide,
    products_of,
    quantizable,
)
from lorakit.weights.nf4 import (
    FourBitWeight,
    Source,
    bitsandbytes,
    is_four_bit,
    keep_as_bytes,
    packed_parameter,
    remember_source,
    settle,
)

_METHOD = "lorakit_nf4"
_READS_FOUR_BIT = "Bnb4bitDeserialize"
_RETURN_EVERY_BYTES = 2_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """What of a model is in 4 bits, and what that saves.

    Attributes:
        storage: the data type: nf4.
        num_layers: linear layers in 4 bits.
        num_params: their numbers.
        num_bytes: what these take: packed numbers and scales.
        bf16_bytes: what they would take in bfloat16.
        num_dense_params: the other numbers of the model: head, embeddings, norms, biases.
        dense_bytes: what those take.
        compute_dtype: what products are computed in.
    """

    storage: str
    num_layers: int
    num_params: int
    num_bytes: int
    bf16_bytes: int
    num_dense_params: int
    dense_bytes: int
    compute_dtype: str

    @property
    def bits_per_param(self) -> float:
        """Stored bits per 4-bit number, scales included."""
        return 8 * self.num_bytes / self.num_params

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "bits_per_param": self.bits_per_param}

    def __str__(self) -> str:
        return (
            f"{self.storage}: {self.num_layers} layers, {format_count(self.num_params)} parameters "
            f"in {format_bytes(self.num_bytes)} ({self.bits_per_param:.3f} bits each; "
            f"{format_bytes(self.bf16_bytes)} in bfloat16); {format_count(self.num_dense_params)} "
            f"parameters dense in {format_bytes(self.dense_bytes)}; computed in "
            f"{self.compute_dtype}"
        )


def quantization_of(model: nn.Module) -> Quantization | None:
    """What of a loaded model is in 4 bits; None for a dense one."""
    layers = [module for module in model.modules() if is_four_bit(module)]
    if not layers:
        return None
    weights = [FourBitWeight(layer) for layer in layers]
    packed = {id(layer.get_parameter("weight")) for layer in layers}
    dense = {id(p): p for p in model.parameters() if id(p) not in packed}.values()
    num_quantized = sum(_size(layer) for layer in layers)
    return Quantization(
        storage=weights[0].storage(),
        num_layers=len(layers),
        num_params=num_quantized,
        num_bytes=sum(weight.num_bytes() for weight in weights),
        bf16_bytes=2 * num_quantized,
        num_dense_params=sum(p.numel() for p in dense),
        dense_bytes=sum(p.numel() * p.element_size() for p in dense),
        compute_dtype=str(weights[0].dtype()).removeprefix("torch."),
    )


def four_bit_config(model: PreTrainedModel) -> BitsAndBytesConfig:
    """What config.json must say so that transformers reads these 4-bit weights back."""
    dense = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not is_four_bit(module)
    ]
    layers = [FourBitWeight(m) for m in model.modules() if is_four_bit(m)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=layers[0].storage() if layers else "nf4",
        bnb_4bit_use_double_quant=layers[0].is_nested() if layers else True,
        bnb_4bit_compute_dtype=layers[0].dtype() if layers else torch.float32,
        llm_int8_skip_modules=dense,
    )


def finish_four_bit(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a model with 4-bit layers, ours or transformers', what the rest of lorakit expects.

    Mutates `model`: what is dense is cast to `dtype`, products are computed in `dtype`, nothing
    repacks a weight, and `save_pretrained` writes bitsandbytes' layout.
    """
    packed: set[int] = set()
    for name, module in model.named_modules():
        if is_four_bit(module):
            _require_packed(name, module)
            settle(module)
            keep_as_bytes(module)
            layer = cast(Any, module)
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.weight.quant_state.dtype = dtype
            packed.add(id(layer.weight))
    for name, parameter in model.named_parameters():
        is_dense = parameter.is_floating_point() and id(parameter) not in packed
        if is_dense and not kept_wide(model, name, dtype):
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    config = four_bit_config(model)
    model.config.quantization_config = config
    marks = cast(Any, model)
    marks.hf_quantizer = _AsStored(config, can_be_read_again=not products_of(model))
    marks.quantization_method = QuantizationMethod.BITS_AND_BYTES
    # The step that read a stored 4-bit weight has no inverse: `save_pretrained` would stop at it,
    # and needs none, because the layer hands over what is stored.
    marks._weight_conversions = [
        step
        for step in vars(model).get("_weight_conversions") or ()
        if not isinstance(step, WeightConverter)
        or all(type(op).__name__ != _READS_FOUR_BIT for op in step.operations)
    ]
    marks.is_loaded_in_4bit = True
    # transformers' Trainer refuses what carries this mark, whatever adapter is on it.
    vars(model).pop("is_quantized", None)


def _require_packed(name: str, layer: nn.Module) -> None:
    if vars(layer.get_parameter("weight")).get("quant_state") is None:
        raise ModelError(
            "a layer that should be in 4 bits is not",
            where=f"{name}.weight",
            expected="packed numbers and their scales, as config.json (quantization_config) says",
            found=str(layer.get_parameter("weight").dtype).removeprefix("torch."),
            remedy="save the model again with the tool that quantized it, or, if its weights are "
            "dense, take quantization_config out of config.json",
        )


class _AsStored(Bnb4BitHfQuantizer):
    """Tells `save_pretrained` how the layers are stored, and whether transformers reads them back.

    Args:
        config: see `four_bit_config`.
        can_be_read_again: whether a saved directory can be loaded.
    """

    def __init__(self, config: BitsAndBytesConfig, *, can_be_read_again: bool) -> None:
        super().__init__(config, pre_quantized=True)
        self._can_be_read_again = can_be_read_again

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """False where transformers would not put 4-bit layers in these places."""
        return self._can_be_read_again


class Nf4OnLoad(QuantizationConfigMixin):
    """Asks `from_pretrained` to quantize while it reads.

    Args:
        name: the model's, for messages.
        dtype: what products will be computed in.
        device: where each tensor is quantized, and stays.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(quant_method=cast(QuantizationMethod, _METHOD))
        self.name = name
        self.dtype = dtype
        self.device = device
        self.not_finite: list[str] = []
        self.freed_bytes = 0


class Nf4Quantizer(HfQuantizer):
    """Puts 4-bit layers into the empty model, and hands transformers the step that fills them."""

    def __init__(self, quantization_config: Nf4OnLoad, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.wanted = quantization_config

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters on top can be trained."""
        return True

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`finish_four_bit` sees to that."""
        return True

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether this is the weight of a 4-bit layer."""
        owner, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and is_four_bit(model.get_submodule(owner))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        library = bitsandbytes()
        wanted = self.wanted
        require_memory(wanted.name, estimate_nf4_bytes(model, wanted.dtype), wanted.device)
        layers = quantizable(model)
        if not layers:
            raise ModelError(
                "nothing of this model can be kept in 4 bits",
                where=wanted.name,
                expected="linear layers in the pretrained body",
                found=type(model).__name__,
                remedy="load it dense",
            )
        for name, module in layers.items():
            with torch.device("meta"):
                layer = library.nn.Linear4bit(
                    *_in_and_out(module),
                    bias="bias" in dict(module.named_parameters(recurse=False)),
                    compute_dtype=wanted.dtype,
                    quant_type="nf4",
                )
            # transformers asks for the class when it reads such a layer again.
            layer.source_cls = type(module)
            layer.requires_grad_(False)
            model.set_submodule(name, layer)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Refuse weights that could not be quantized; the configuration is written afterwards."""
        broken = self.wanted.not_finite
        if broken:
            raise ModelError(
                "weights that are not finite cannot be quantized",
                where=broken[0],
                found=f"{len(broken)} such tensors",
                remedy="download the model again, or load it dense to look at them",
            )
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """The step for one weight."""
        return _QuantizeOne(self.wanted)


register_quantization_config(_METHOD)(Nf4OnLoad)
register_quantizer(_METHOD)(Nf4Quantizer)


class _QuantizeOne(ConversionOps):
    def __init__(self, config: Nf4OnLoad) -> None:
        self.config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        model: PreTrainedModel = kwargs["model"]
        result: dict[str, Any] = {}
        for name, given in input_dict.items():
            value: Tensor = given[0] if isinstance(given, list) else given
            layer = model.get_submodule(name.rpartition(".")[0])
            transposed = issubclass(cast(Any, layer).source_cls, Conv1D)
            remember_source(
                layer, Source(tuple(value.shape), value.dtype, sample(value), transposed)
            )
            oriented = value.T if transposed else value
            place = (self.config.dtype, self.config.device)
            try:
                result[name] = packed_parameter(oriented, layer, *place)
            except ModelError:
                # All of them are named once the whole model is read.
                self.config.not_finite.append(name)
                result[name] = packed_parameter(torch.zeros_like(oriented), layer, *place)
            vars(layer)["_is_hf_initialized"] = True
            self.config.freed_bytes += value.numel() * value.element_size()
        if self.config.freed_bytes > _RETURN_EVERY_BYTES:
            # Small packed weights come to lie in the gaps that dense ones leave, and the next dense
            # one no longer fits there: without this the gaps add up to a dense copy.
            return_freed_memory()
            self.config.freed_bytes = 0
        return result


def _in_and_out(module: nn.Module) -> tuple[int, int]:
    first, second = module.get_parameter("weight").shape
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _size(layer: nn.Module) -> int:
    linear = cast(nn.Linear, layer)
    return linear.in_features * linear.out_features
