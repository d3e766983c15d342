"""The arms of `preference_speed.py`: lorakit and TRL on the same pairs of the same tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lorakit.data.collate import PreferenceCollator
from lorakit.data.options import SftOptions
from lorakit.data.preference import build_preferences
from lorakit.data.sources import load_rows
from lorakit.models.load import load_base_model, load_tokenizer
from lorakit.train.config import TrainConfig
from lorakit.train.run import train

ARMS = {
    "lorakit": "lorakit train, task: dpo, its defaults",
    "trl": "PEFT, TRL's DPOTrainer's defaults, the reference is the base without the adapter",
    "trl-two-models": "the same with a separate reference model",
    "trl-two-models-fast": "the same with a separate reference model, no gradient checkpointing",
}
BETA = 0.1
_LR = 5e-5


class Arm:
    """One arm: its pairs and its training."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting
        self.name: str = setting["arm"]
        self.output = tempfile.mkdtemp()
        self.tokenizer = load_tokenizer(setting["model"])
        rows = load_rows(Path(setting["rows"]))
        self.pairs = build_preferences(rows, self.tokenizer, SftOptions(), paired=True)
        self.tokens_per_step = sum(map(len, self.pairs)) * setting["batch_size"] / len(self.pairs)

    def train(self) -> None:
        """Until the parent says it is enough."""
        if self.name == "lorakit":
            self._lorakit()
        else:
            self._trl().train()

    def batches(self) -> list[dict[str, Any]]:
        """Two fixed batches, as the arm's trainer takes them."""
        size = min(4, len(self.pairs) // 2)
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        if self.name == "lorakit":
            collate = PreferenceCollator(pad, mismatched=False)
            return [collate(self.pairs[i : i + size]) for i in (0, size)]
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        rows = self._rows()
        return [DataCollatorForPreference(pad)(rows[i : i + size]) for i in (0, size)]

    def before_step(self) -> None:
        """Nothing to prepare."""

    def after_step(self) -> None:
        """Nothing to note."""

    def profiled(self) -> str:
        """No profile."""
        return ""

    def _lorakit(self) -> None:
        config = {
            "model": {"ref": self.setting["model"], "dtype": "float32"},
            "data": {"train": self.setting["rows"]},
            "task": "dpo",
            "preference": {"beta": BETA},
            "lora": {"r": 8, "alpha": 16, "targets": "all-linear"},
            "train": {
                "epochs": 1,
                "batch_size": self.setting["batch_size"],
                "precision": "fp32",
                "lr": _LR,
            },
            "output": self.output + "/run",
            "seed": self.setting["seed"],
        }
        train(TrainConfig.from_dict(config))

    def _trl(self) -> Any:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        class OnTheseTokens(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *_others: Any) -> Any:
                return dataset

        separate = self.name.startswith("trl-two-models")
        options = {"gradient_checkpointing": False} if self.name.endswith("-fast") else {}
        return OnTheseTokens(
            self._base(),
            ref_model=self._base() if separate else None,
            args=DPOConfig(
                output_dir=self.output,
                beta=BETA,
                learning_rate=_LR,
                per_device_train_batch_size=self.setting["batch_size"],
                num_train_epochs=1,
                bf16=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                seed=self.setting["seed"],
                **options,
            ),
            train_dataset=Dataset.from_list(self._rows()),
            processing_class=self.tokenizer,
            peft_config=LoraConfig(
                r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )

    def _base(self) -> Any:
        return load_base_model(self.setting["model"], dtype="float32")

    def _rows(self) -> list[dict[str, list[int]]]:
        found = []
        for pair in self.pairs:
            chosen, rejected = (answer.example for answer in pair.answers)
            prompt = next(i for i, label in enumerate(chosen.labels) if label >= 0)
            assert chosen.input_ids[:prompt] == rejected.input_ids[:prompt]
            found.append(
                {
                    "prompt_ids": chosen.input_ids[:prompt],
                    "chosen_ids": chosen.input_ids[prompt:],
                    "rejected_ids": rejected.input_ids[prompt:],
                }
            )
        return found
