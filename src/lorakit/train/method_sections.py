"""The sections of a training config that belong to one method each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorakit.adapters.spec import DATA_INITS, DATA_RANKS, MOVING, LoraSpec
from lorakit.errors import ConfigError
from lorakit.methods.bitfit import BitFitSpec
from lorakit.methods.bottleneck_spec import AdapterDropSpec, BottleneckSpec
from lorakit.methods.full import FullSpec
from lorakit.methods.last_layers import LastLayersSpec
from lorakit.methods.prefix_spec import PrefixEmbeddingSpec, PrefixLayerSpec
from lorakit.methods.registry import METHODS, require_method
from lorakit.train import schema
from lorakit.train.adalora_section import AdaLoraSection


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class MethodSections:
    """Which method is trained, and one section per method; a method adds its field here.

    Raises:
        ConfigError: no such method, or the section of another one is set.
    """

    continue_from: str | None = field(
        default=None,
        metadata=_help(
            "directory of a saved LoRA adapter that is trained further; it keeps its ranks and "
            "sites, the result is another file"
        ),
    )
    on_top_of: str | None = field(
        default=None,
        metadata=_help(
            "directory of a saved LoRA adapter that stays frozen beneath the new one; both are "
            "saved as one"
        ),
    )
    method: str = field(
        default="lora", metadata=_help("what is trained; its options stand in its own section")
    )
    lora: LoraSpec = field(default_factory=LoraSpec, metadata=_help("the adapter"))
    adalora: AdaLoraSection = field(
        default_factory=AdaLoraSection, metadata=_help("lora.ranks: adalora, how the ranks move")
    )
    full: FullSpec = field(default_factory=FullSpec, metadata=_help("full fine-tuning"))
    last_layers: LastLayersSpec = field(
        default_factory=LastLayersSpec, metadata=_help("the last layers only")
    )
    bitfit: BitFitSpec = field(default_factory=BitFitSpec, metadata=_help("biases only"))
    prefix_embedding: PrefixEmbeddingSpec = field(
        default_factory=PrefixEmbeddingSpec, metadata=_help("embeddings of special tokens")
    )
    prefix_layer: PrefixLayerSpec = field(
        default_factory=PrefixLayerSpec, metadata=_help("activations of special tokens")
    )
    houlsby: BottleneckSpec = field(
        default_factory=BottleneckSpec, metadata=_help("Adapter-H: two adapters in every block")
    )
    lin: BottleneckSpec = field(
        default_factory=BottleneckSpec, metadata=_help("Adapter-L: one adapter behind the MLP")
    )
    pfeiffer: BottleneckSpec = field(
        default_factory=BottleneckSpec, metadata=_help("Adapter-P: one adapter behind the MLP")
    )
    adapterdrop: AdapterDropSpec = field(
        default_factory=AdapterDropSpec, metadata=_help("Adapter-D: none in the first blocks")
    )

    def __post_init__(self) -> None:
        require_method(self.method)
        sections = self._sections()
        for name in METHODS:
            if name != self.method and sections[name] != type(sections[name])():
                raise ConfigError(
                    f"the section {name!r} is set, and the method is {self.method!r}",
                    where=name,
                    expected=f"the options of {self.method}, in its own section",
                    remedy=f"method: {name}, or remove the section",
                )

    @property
    def set_beside(self) -> tuple[str, ...]:
        """The keys beside the method's own section that mean something here."""
        named = tuple(k for k in ("continue_from", "on_top_of") if self.__dict__[k] is not None)
        return named + (("adalora",) if self.lora.ranks == MOVING else ())

    def _sections(self) -> dict[str, Any]:
        """Method -> its section."""
        return {name: self.__dict__[name] for name in METHODS}

    @property
    def options(self) -> dict[str, Any]:
        """The chosen method's section, as plain values."""
        return schema.plain(self._sections()[self.method])


def check_data_start(task: str, lora: LoraSpec) -> None:
    """Refuse ranks and starts from data where rows are not what a model takes as keywords.

    Raises:
        ConfigError: the task compares answers.
    """
    waits = lora.ranks in DATA_RANKS or lora.init in DATA_INITS
    if waits and task not in ("sft", "classify"):
        raise ConfigError(
            "ranks and starts taken from data look at rows of task sft or classify",
            where="lora.ranks" if lora.ranks in DATA_RANKS else "lora.init",
            found=f"task {task}",
            remedy="use ranks: uniform and init: gaussian",
        )
