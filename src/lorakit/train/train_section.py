"""The section `train` of a training config: how long, how fast, how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lorakit.errors import ConfigError
from lorakit.train.data_section import require

Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["linear", "cosine", "constant"]
BestMetric = Literal[
    "loss",
    "accuracy",
    "f1",
    "accuracy_f1",
    "macro_f1",
    "matthews",
    "pearson",
    "spearman",
    "pearson_spearman",
    "reward_accuracy",
    "reward_margin",
    "reward",
]

DEFAULT_EPOCHS = 3.0


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How to train."""

    epochs: float | None = field(
        default=None,
        metadata=_help(f"passes over the data; {DEFAULT_EPOCHS:g} when max_steps is not given"),
    )
    max_steps: int | None = field(
        default=None, metadata=_help("optimizer steps, in place of epochs")
    )
    max_minutes: float | None = field(
        default=None,
        metadata=_help("end after this time, the rate falling by the clock where it is ahead"),
    )
    batch_size: int = field(default=8, metadata=_help("rows in one forward pass, per device"))
    gradient_accumulation: int = field(
        default=1, metadata=_help("forward passes per optimizer step")
    )
    lr: float = field(default=2e-4, metadata=_help("highest learning rate"))
    lora_plus_ratio: float | None = field(
        default=None,
        metadata=_help(
            "LoRA+: how many times train.lr lora_B and trained vectors learn at (the paper: about "
            "16); null: one rate"
        ),
    )
    schedule: Schedule = field(
        default="linear",
        metadata=_help("after the warmup: linear to zero, cosine to zero, or constant"),
    )
    warmup_steps: int = field(
        default=0, metadata=_help("steps over which the rate rises from zero")
    )
    warmup_ratio: float = field(
        default=0.0, metadata=_help("the same as a share of all steps, 0 to 1")
    )
    optimizer: Literal["adamw", "paged_adamw"] = field(
        default="adamw",
        metadata=_help(
            "adamw, or paged_adamw: the same with its state in CUDA's unified memory, moved to the "
            "host when the device is full (extra: quant)"
        ),
    )
    weight_decay: float = field(default=0.0, metadata=_help("AdamW's decoupled weight decay"))
    adam_betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata=_help("AdamW's decay rates of the two moments")
    )
    adam_eps: float = field(default=1e-8, metadata=_help("AdamW's epsilon"))
    max_grad_norm: float | None = field(
        default=1.0, metadata=_help("clip the gradient to this norm; null does not clip")
    )
    label_smoothing: float = field(
        default=0.0, metadata=_help("share of the target spread over the vocabulary, 0 to 1")
    )
    precision: Precision = field(
        default="auto",
        metadata=_help(
            "arithmetic of the forward pass: fp32, bf16 (autocast; adapter, loss and optimizer "
            "stay float32), or auto: bf16 where the device has it in hardware"
        ),
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_help("recompute activations in the backward pass: less memory")
    )
    length_grouping: bool = field(
        default=True, metadata=_help("batches of rows of similar length: less padding")
    )
    init_batches: int = field(
        default=8,
        metadata=_help("batches that lora.init and lora.ranks look at before the first step"),
    )
    eval_every: int | Literal["epoch"] = field(
        default="epoch", metadata=_help("validate every so many steps, or after each epoch")
    )
    eval_batch_size: int | None = field(
        default=None, metadata=_help("rows per validation batch; null: batch_size")
    )
    save_every: int | Literal["epoch"] = field(
        default="epoch", metadata=_help("checkpoint every so many steps, or after each epoch")
    )
    keep_checkpoints: int = field(
        default=2, metadata=_help("how many of the newest checkpoints stay; the best stays beside")
    )
    keep_best: bool = field(
        default=True,
        metadata=_help("the final adapter is the one with the best validation"),
    )
    best_metric: BestMetric | None = field(
        default=None,
        metadata=_help(
            "what makes a validation the best: loss (the lowest), or a metric of the task (the "
            "highest); null: loss for sft and preferences, accuracy for classes, pearson for "
            "numbers, reward for grpo"
        ),
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=_help("stop after so many validations in a row without a new best"),
    )
    tensorboard: bool = field(
        default=False, metadata=_help("also write TensorBoard events (extra: tensorboard)")
    )

    def __post_init__(self) -> None:
        self._check_length()
        self._check_optimizer()
        self._check_cadence()

    def _check_length(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise ConfigError(
                "the length of the run is given twice",
                where="train.epochs and train.max_steps",
                expected="one of them",
                found=f"epochs {self.epochs:g}, max_steps {self.max_steps}",
                remedy="set the other to null or remove it",
            )
        for name, value in (("epochs", self.epochs), ("max_minutes", self.max_minutes)):
            require(value is None or value > 0, f"train.{name}", "> 0", value)
        for name in ("max_steps", "batch_size", "gradient_accumulation", "init_batches"):
            _require_at_least(self, name, 1)

    def _check_optimizer(self) -> None:
        require(self.lr > 0, "train.lr", "lr > 0", self.lr)
        ratio = self.lora_plus_ratio
        require(ratio is None or ratio > 0, "train.lora_plus_ratio", "> 0 or null", ratio)
        _require_at_least(self, "warmup_steps", 0)
        _require_at_least(self, "weight_decay", 0)
        require(0 <= self.warmup_ratio < 1, "train.warmup_ratio", "0 to 1", self.warmup_ratio)
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                "the warmup is given twice",
                where="train.warmup_steps and train.warmup_ratio",
                expected="one of them",
                remedy="remove one of them",
            )
        for beta in self.adam_betas:
            require(0 <= beta < 1, "train.adam_betas", "two numbers, 0 <= beta < 1", beta)
        require(self.adam_eps > 0, "train.adam_eps", "> 0", self.adam_eps)
        norm = self.max_grad_norm
        require(norm is None or norm > 0, "train.max_grad_norm", "> 0 or null", norm)
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "train.label_smoothing", "0 <= share < 1", smoothing)

    def _check_cadence(self) -> None:
        for name in ("eval_every", "save_every"):
            every = getattr(self, name)
            require(every == "epoch" or every >= 1, f"train.{name}", ">= 1 or 'epoch'", every)
        for name in ("eval_batch_size", "keep_checkpoints", "early_stopping_patience"):
            _require_at_least(self, name, 1)


def _require_at_least(section: TrainSection, name: str, least: int) -> None:
    value = getattr(section, name)
    require(value is None or value >= least, f"train.{name}", f">= {least}", value)
