"""Reinforcement learning with rewards that can be computed: GRPO. The loss is the learner's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.adapters.bind import bind_adapter, plan_binding
from lorakit.data.collate import Collator
from lorakit.data.encode import IGNORED, Example
from lorakit.data.examples import ExampleList
from lorakit.data.hashes import template_hash, tokenizer_hash
from lorakit.data.rows import Rows
from lorakit.errors import DataError
from lorakit.evaluate.rewards import Asked, Rewards
from lorakit.methods.base import Method
from lorakit.models.causal import require_causal
from lorakit.models.empty import empty_model
from lorakit.models.sampling import require_sampling
from lorakit.train.beginning import read_reference
from lorakit.train.config import TrainConfig
from lorakit.train.objectives.base import ExampleSet
from lorakit.train.objectives.base_model import load_to_pack
from lorakit.train.objectives.grpo_learner import ASKED, REWARD, GrpoLearner

_REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What answers are sampled to.

    Attributes:
        ids: its tokens.
        room: tokens of the longest answer.
        asked: its place among all prompts of the objective.
        row: its row in the data set.
    """

    ids: tuple[int, ...]
    room: int
    asked: int
    row: int

    def __len__(self) -> int:
        """Tokens with the longest answer."""
        return len(self.ids) + self.room


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """Counts over one data set.

    Attributes:
        num_rows: rows that were read.
        num_examples: prompts.
        num_tokens: tokens of the prompts.
        num_dropped: rows left out because their prompt is longer than max_length.
        longest: tokens of the longest prompt with the longest answer.
        tokenizer_sha256: see `lorakit.data.hashes`.
        template_sha256: see `lorakit.data.hashes`.
    """

    num_rows: int
    num_examples: int
    num_tokens: int
    num_dropped: int
    longest: int
    tokenizer_sha256: str
    template_sha256: str | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in sentences."""
        dropped = self.num_dropped
        return (f"{dropped} prompts longer than max_length are left out",) * bool(dropped)

    def to_json(self) -> dict[str, Any]:
        """Plain values, notes included."""
        return asdict(self) | {"notes": list(self.notes)}


Prompts = ExampleList[Prompt, PromptReport]


class GrpoObjective:
    """Answers that earn a reward.

    Args:
        config: the run.
        tokenizer: of the base.

    Raises:
        ConfigError: a reward function that cannot be loaded.
        AdapterFileError: the adapter that the run begins with cannot be read.
    """

    metrics: tuple[str, ...] = (REWARD,)
    best = REWARD
    unit = "rows"

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._options = config.grpo
        self.rows_each = config.grpo.num_samples
        self._rewards = Rewards(config.grpo.weights)
        # The reference is the model as the run begins: the base, or the adapter it goes on from.
        self._reference = read_reference(config.beginnings).adapter if config.grpo.beta else None
        self._asked: list[Asked] = []
        pad = tokenizer.pad_token_id
        self._pad = pad if isinstance(pad, int) else 0
        self._collator = Collator(self._pad)

    def empty_model(self) -> PreTrainedModel:
        """The base as it is; answers can be sampled from it."""
        base = empty_model(self._config.model.ref)
        require_causal(base)
        require_sampling(base)
        if self._reference is not None:
            plan_binding(base, self._reference)
        return base

    def load_model(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """The base, ready to be packed, with the adapter attached that is the reference."""
        model = load_to_pack(self._config.model, dtype, device)
        if self._reference is not None:
            bind_adapter(model, self._reference, _REFERENCE)
        return model

    def beside(self, model: nn.Module) -> tuple[str, ...]:
        """Nothing: the base has its head."""
        return ()

    def build(self, rows: Rows, *, label: str) -> Prompts:
        """One prompt per row.

        Raises:
            DataError: a row without what the reward needs, or no prompt within max_length.
        """
        data, room = self._config.data, self._options.max_new_tokens
        found: list[Prompt] = []
        for row, asked in enumerate(self._rewards.ask(rows, self._tokenizer, data, label=label)):
            if not asked.prompt_ids:
                raise DataError(
                    "a prompt has no tokens",
                    where=asked.origin,
                    expected="at least one token to continue from",
                )
            if data.max_length is not None and len(asked.prompt_ids) > data.max_length:
                if data.on_too_long == "error":
                    raise DataError(
                        "a prompt is longer than max_length",
                        where=asked.origin,
                        expected=f"at most {data.max_length} tokens",
                        found=f"{len(asked.prompt_ids)} tokens",
                        remedy="raise max_length, or set on_too_long: drop",
                    )
                continue
            found.append(Prompt(asked.prompt_ids, room, len(self._asked), row))
            self._asked.append(asked)
        report = self._report(len(rows), found)
        if not found:
            raise DataError(
                "no prompt is left to answer", where=rows.source, found="; ".join(report.notes)
            )
        return Prompts(found, report)

    def _report(self, num_rows: int, found: Sequence[Prompt]) -> PromptReport:
        return PromptReport(
            num_rows=num_rows,
            num_examples=len(found),
            num_tokens=sum(len(prompt.ids) for prompt in found),
            num_dropped=num_rows - len(found),
            longest=max(map(len, found), default=0),
            tokenizer_sha256=tokenizer_hash(self._tokenizer),
            template_sha256=template_hash(self._tokenizer, self._config.data.chat_template),
        )

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """The prompts padded on the right, input_ids and attention_mask; asked, int64 (batch,)."""
        rows = [Example(list(e.ids), [IGNORED] * len(e.ids)) for e in examples]
        batch = self._collator(rows)
        del batch["labels"]
        return {**batch, ASKED: torch.tensor([example.asked for example in examples])}

    def num_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Prompts."""
        return torch.tensor(len(batch[ASKED]))

    def most_labels(self, examples: ExampleSet, num_rows: int) -> int:
        """The tokens of the longest answers."""
        return num_rows * self.rows_each * self._options.max_new_tokens

    def line(self, examples: ExampleSet) -> str:
        """Prompts, what is sampled, and what it earns."""
        options = self._options
        report = examples.report
        weights = options.weights
        earned = ", ".join(name if w == 1 else f"{w:g} {name}" for name, w in weights.items())
        told = f"{report.num_tokens:,} tokens of prompts, {options.num_samples} answers to each"
        return f"{told}; reward: {earned}"

    def facts(self) -> dict[str, Any]:
        """What was rewarded."""
        options = self._options
        facts = {"reward": options.weights, "num_samples": options.num_samples}
        return {"grpo": {**facts, "temperature": options.temperature, "beta": options.beta}}

    def with_model(
        self, examples: ExampleSet, model: PreTrainedModel, method: Method, facts: dict[str, Any]
    ) -> ExampleSet:
        """The examples as they are."""
        return examples

    def bind(self, model: PreTrainedModel, method: Method, *, fresh: bool) -> GrpoLearner:
        """The loss on this model."""
        return GrpoLearner(
            model,
            method,
            tokenizer=self._tokenizer,
            options=self._options,
            rewards=(self._rewards, self._asked),
            reference=None if self._reference is None else _REFERENCE,
        )
