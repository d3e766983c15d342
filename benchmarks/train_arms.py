"""The arms of `train_speed.py`: who trains, and how."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PEERS = {
    "peft": "PEFT, transformers.Trainer's defaults",
    "trl": "PEFT, TRL's SFTTrainer's defaults (fused head, checkpointing)",
    "trl-best": "the same, no checkpointing, rows grouped by length",
    "trl-padding-free": "the same, no checkpointing, padding_free",
    "lorakit": "lorakit train, its defaults",
    "lorakit-4k-pages": "lorakit train, memory in pages of 4 KiB",
    "lorakit-full": "lorakit train, method: full",
    "lorakit-profiled": "lorakit train, profiled",
}


def describe(name: str) -> str:
    """An arm in words."""
    return _PEERS[name]


def has_huge_pages(name: str) -> bool:
    """Whether the arm's memory comes in 2 MiB pages, as the verbs of lorakit that train have it."""
    return name.startswith("lorakit") and name != "lorakit-4k-pages"


def peer_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("peft", "trl")}


class Arm:
    """One arm: its data, its training, its profile."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting
        self.name: str = setting["arm"]
        self.output = tempfile.mkdtemp()
        self._profiler: Any = None
        self._started = self._step_s = 0.0
        self._steps = 0
        self.examples, self.tokenizer = _examples(setting)
        tokens = sum(len(e.input_ids) for e in self.examples)
        self.tokens_per_step = tokens * setting["batch_size"] / len(self.examples)

    def train(self) -> None:
        """Until the parent says it is enough."""
        trainers: dict[str, Callable[[], None]] = {"peft": self._peft}
        trainers |= {name: self._trl for name in _PEERS if name.startswith("trl")}
        trainers.get(self.name, self._lorakit)()

    def batches(self) -> list[dict[str, Any]]:
        """Two fixed batches."""
        from lorakit.data.collate import Collator

        size = min(4, len(self.examples) // 2)
        collate = Collator(self.tokenizer.pad_token_id or 0)
        return [collate(self.examples[i : i + size]) for i in (0, size)]

    def before_step(self) -> None:
        """Start the profiler, if this arm has one."""
        if self.name.endswith("-profiled"):
            from torch._C._profiler import _ExperimentalConfig
            from torch.profiler import ProfilerActivity, profile

            self._profiler = profile(
                activities=[ProfilerActivity.CPU],
                record_shapes=True,
                # Each core takes some of the rows in a thread of its own.
                experimental_config=_ExperimentalConfig(profile_all_threads=True),
            )
            self._profiler.__enter__()
            self._started = time.perf_counter()

    def after_step(self) -> None:
        """Stop it."""
        if self._profiler is not None:
            self._step_s = time.perf_counter() - self._started
            self._profiler.__exit__(None, None, None)

    def profiled(self) -> str:
        """What the profiler saw in the last step, and the floor."""
        if self._profiler is None:
            return ""
        from train_floor import report

        return report(self._profiler, self.setting, self._step_s)

    def _peft(self) -> None:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        arguments = TrainingArguments(**self._common())
        collator = DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        model = self._peft_model()
        Trainer(model, arguments, train_dataset=self._rows(), data_collator=collator).train()

    def _trl(self) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        options: dict[str, Any] = {}
        if self.name == "trl-best":
            options = {
                "gradient_checkpointing": False,
                "train_sampling_strategy": "group_by_length",
            }
        elif self.name == "trl-padding-free":
            options = {"gradient_checkpointing": False, "padding_free": True, "max_length": None}
        rows = [{k: row[k] for k in ("input_ids", "labels")} for row in self._rows()]
        SFTTrainer(
            self._base(),
            args=SFTConfig(**self._common(), completion_only_loss=True, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            peft_config=_peft_config(),
        ).train()

    def _lorakit(self) -> None:
        from lorakit.train.config import TrainConfig
        from lorakit.train.run import train

        bf16 = self.setting["precision"] == "bf16"
        full = self.name == "lorakit-full"
        config: dict[str, Any] = {
            "model": {
                "ref": self.setting["model"],
                **({"dtype": "bfloat16"} if bf16 and not full else {}),
            },
            "data": {"train": self.setting["rows"]},
            "train": {
                "epochs": 1,
                "batch_size": self.setting["batch_size"],
                "precision": self.setting["precision"],
                **({"lr": 1e-5} if full else {}),
            },
            "output": self.output + "/run",
            "seed": self.setting["seed"],
        }
        if full:
            config["method"] = "full"
        else:
            config["lora"] = {"r": 8, "alpha": 16, "targets": "all-linear"}
        train(TrainConfig.from_dict(config))

    def _common(self) -> dict[str, Any]:
        """What every Trainer is told; the rest is its default."""
        return {
            "output_dir": self.output,
            "per_device_train_batch_size": self.setting["batch_size"],
            "num_train_epochs": 1,
            "learning_rate": 2e-4,
            "bf16": self.setting["precision"] == "bf16",
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": self.setting["seed"],
        }

    def _base(self) -> Any:
        import torch

        from lorakit.models.load import load_base_model

        bf16 = self.setting["precision"] == "bf16"
        return load_base_model(
            self.setting["model"], dtype=torch.bfloat16 if bf16 else torch.float32
        )

    def _peft_model(self) -> Any:
        from peft import get_peft_model

        return get_peft_model(self._base(), _peft_config())

    def _rows(self) -> list[dict[str, list[int]]]:
        return [
            {
                "input_ids": e.input_ids,
                "attention_mask": [1] * len(e.input_ids),
                "labels": e.labels,
            }
            for e in self.examples
        ]


def _peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _examples(setting: dict[str, Any]) -> tuple[list[Any], Any]:
    """The rows as every arm gets them: lorakit's tokens and labels."""
    from lorakit.data.options import SftOptions
    from lorakit.data.sft import build_examples
    from lorakit.data.sources import load_rows
    from lorakit.models.load import load_tokenizer

    tokenizer = load_tokenizer(setting["model"])
    rows = load_rows(Path(setting["rows"]))
    return list(build_examples(rows, tokenizer, SftOptions())), tokenizer
