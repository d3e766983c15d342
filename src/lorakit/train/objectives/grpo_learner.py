"""The loss of GRPO on one model: answers are sampled, scored, and learned by what they earned.

For a prompt, G answers o_1 .. o_G are sampled from the policy; r_i is what o_i earns, and

    A_i = (r_i - mean r) / (std r + 1e-4)                 r_i - mean r   with scale_rewards: false
    loss = - mean over the prompts of 1/G sum_i 1/n_i sum_t (A_i rho_it - beta k3_it)

with n_i the tokens of o_i (`normalise: answer`, GRPO) or max_new_tokens (`constant`, Dr. GRPO). The
ratio rho = pi / pi_sampled is 1: an optimizer step takes answers that were sampled for it, so there
is nothing to clip. Its gradient is that of log pi, so A_i log pi_it stands in the place of A_i rho
here; the value of the loss says nothing, the reward does. With a temperature, pi is the
distribution that was sampled from, at that temperature.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.attach import use
from lorakit.data.collate import Collator
from lorakit.data.encode import IGNORED, Example
from lorakit.data.endings import end_of_sequence_ids
from lorakit.errors import TrainingError
from lorakit.evaluate.rewards import Asked, Rewards
from lorakit.formatting import format_number
from lorakit.math.policy import group_advantages, k3_divergence
from lorakit.methods.base import Method
from lorakit.models.label_head import LabelHead, LabelLogits, evaluating
from lorakit.models.sampling import Sampling, Written, write_answers
from lorakit.train.grpo_section import GrpoSection
from lorakit.train.objectives.base import Inputs, Validated

ASKED, REWARD = "asked", "reward"

# Mean over the tokens of an answer, in nats: what sampling and learning may differ by.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 1e-1


@dataclass(frozen=True, slots=True)
class _Group:
    """The answers to one prompt, and what they earned."""

    prompt: list[int]
    answers: list[Written]
    rewards: list[float]


@dataclass(frozen=True, slots=True)
class _Step:
    """What is told of a batch."""

    groups: list[_Group]
    num_learned: int
    sample_s: float
    kl: float | None


class GrpoLearner:
    """The loss of a policy on the answers that it samples itself.

    Args:
        model: with the method attached; trained in place by whoever steps.
        method: what is trained.
        tokenizer: of the base.
        options: how answers are sampled and learned.
        rewards: what answers earn, and the prompts by the number that a batch carries.
        reference: the adapter's name on the model; None for the model with the method switched off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        *,
        tokenizer: PreTrainedTokenizerBase,
        options: GrpoSection,
        rewards: tuple[Rewards, Sequence[Asked]],
        reference: str | None,
    ) -> None:
        self.label_head = LabelHead(model)
        self._model = model
        self._method = method
        self._tokenizer = tokenizer
        self._options = options
        self._rewards, self._asked = rewards
        self._named = reference
        pad = tokenizer.pad_token_id
        self._pad = pad if isinstance(pad, int) else 0
        self._ends = end_of_sequence_ids(model, tokenizer)
        self._learned = [p for p in model.parameters() if p.requires_grad]
        self._checked = False
        self._steps: list[_Step] = []

    def loss(self, inputs: Inputs, *, num_items: Tensor | None, label_smoothing: float) -> Tensor:
        """Of answers sampled now; summed over the prompts, divided by those of the whole step.

        The samples depend on torch's global generator, which the seed and the checkpoint decide.

        Raises:
            TrainingError: a reward function failed; or the model does not learn what it samples.
        """
        started = time.perf_counter()
        seed = int(torch.randint(1 << 62, ()).item())
        generator = torch.Generator().manual_seed(seed)
        groups = self._written(inputs, self._sampling(), generator)
        sample_s = time.perf_counter() - started
        if not self._checked:
            self._check_sampled(groups[0])
        rows, weights, shares = self._to_learn(groups)
        divisor = float(len(groups) if num_items is None else num_items)
        total, kl = torch.zeros((), device=self._model.device), None
        if not rows:
            # Every parameter has its gradient, 0, as in any other step.
            total = sum((p.sum() * 0.0 for p in self._learned), start=total)
        elif self._options.beta == 0 and self._options.temperature == 1:
            batch = self._batch(rows)
            total = self.label_head.loss(batch, num_items=1, row_weights=weights)
        else:
            total, kl = self._at_temperature(self._batch(rows), weights, shares)
        num_learned = sum(sum(label != IGNORED for label in row.labels) for row in rows)
        self._steps.append(_Step(groups, num_learned, sample_s, kl))
        return total / divisor

    def noted(self) -> dict[str, float]:
        """Rewards and answers of the batches since the last call."""
        steps, self._steps = self._steps, []
        groups = [group for step in steps for group in step.groups]
        if not groups:
            return {}
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float64)
        answers = [answer for group in groups for answer in group.answers]
        lengths = [len(answer.ids) for answer in answers]
        kls = [step.kl for step in steps if step.kl is not None]
        return {
            REWARD: float(rewards.mean()),
            "reward_std": float(rewards.std(1).mean()),
            "no_signal": float((rewards == rewards[:, :1]).all(1).double().mean()),
            "answer_tokens": sum(lengths) / len(lengths),
            "truncated": sum(not answer.finished for answer in answers) / len(answers),
            **({"kl": sum(kls) / len(kls)} if kls else {}),
            "sampled_tokens": sum(lengths),
            "learned_tokens": sum(step.num_learned for step in steps),
            "sample_s": sum(step.sample_s for step in steps),
        }

    def observe(self, batches: Iterable[Inputs]) -> list[tuple[float, int, bool]]:
        """Of each greedy answer: what it earns, its tokens, whether it was finished."""
        greedy = Sampling(
            max_new_tokens=self._options.max_new_tokens, end_ids=self._ends, pad_id=self._pad
        )
        return [
            (group.rewards[0], len(group.answers[0].ids), group.answers[0].finished)
            for inputs in batches
            for group in self._written(inputs, greedy, None)
        ]

    def conclude(self, observed: Sequence[list[tuple[float, int, bool]]]) -> Validated:
        """The mean reward; the loss is its negative."""
        seen = [one for some in observed for one in some]
        rewards, lengths, finished = zip(*seen, strict=True)
        mean = sum(rewards) / len(seen)
        metrics = {
            REWARD: mean,
            "answer_tokens": sum(lengths) / len(seen),
            "truncated": 1 - sum(finished) / len(seen),
        }
        return Validated(loss=-mean, num_items=len(seen), metrics=metrics)

    def _sampling(self) -> Sampling:
        return Sampling(
            max_new_tokens=self._options.max_new_tokens,
            end_ids=self._ends,
            pad_id=self._pad,
            num_samples=self._options.num_samples,
            temperature=self._options.temperature,
        )

    def _written(
        self, inputs: Inputs, sampling: Sampling, generator: torch.Generator | None
    ) -> list[_Group]:
        """Answers to the prompts of a batch, and what they earn."""
        masks = inputs["attention_mask"].bool().cpu()
        prompts = [
            ids[mask].tolist() for ids, mask in zip(inputs["input_ids"].cpu(), masks, strict=True)
        ]
        answers = write_answers(self._model, prompts, sampling, generator=generator)
        asked = [self._asked[i] for i in inputs[ASKED].tolist()]
        every = [one for one, some in zip(asked, answers, strict=True) for _ in some]
        texts = [self._text(answer) for some in answers for answer in some]
        earned = iter(self._rewards.score(every, texts))
        return [
            _Group(prompt, some, [next(earned) for _ in some])
            for prompt, some in zip(prompts, answers, strict=True)
        ]

    def _text(self, answer: Written) -> str:
        text = self._tokenizer.decode(
            answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text.strip()

    def _to_learn(self, groups: Sequence[_Group]) -> tuple[list[Example], Tensor, Tensor]:
        """Rows with their A_i / (G n_i) and 1 / (G n_i), (rows,) each.

        Answers without an advantage are left out: all of a prompt whose answers earned the same.
        Their distance from the reference would have a gradient, so with beta they stay.
        """
        options = self._options
        rewards = torch.tensor([group.rewards for group in groups], dtype=torch.float32)
        advantages = group_advantages(rewards, scale=options.scale_rewards).tolist()
        found: list[tuple[Example, float, float]] = []
        for group, own in zip(groups, advantages, strict=True):
            for answer, advantage in zip(group.answers, own, strict=True):
                masked = options.mask_truncated and not answer.finished
                if masked or not (advantage or options.beta):
                    continue
                tokens = len(answer.ids)
                if options.normalise == "constant":
                    tokens = options.max_new_tokens
                share = 1 / (len(group.answers) * tokens)
                found.append((_row(group.prompt, answer), advantage * share, share))
        rows = [row for row, _, _ in found]
        weights, shares = ([one[i] for one in found] for i in (1, 2))
        return rows, torch.tensor(weights), torch.tensor(shares)

    def _batch(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        device = self._model.device
        return {name: one.to(device) for name, one in Collator(self._pad)(rows).items()}

    def _at_temperature(
        self, batch: dict[str, Tensor], weights: Tensor, shares: Tensor
    ) -> tuple[Tensor, float | None]:
        """The summed loss with beta, or at another temperature than 1; and the mean k3."""
        beta = self._options.beta
        # The reference comes first: what it needs is given back before the policy keeps anything.
        reference = self._logps(self._reference_logits(batch)) if beta else None
        found = self.label_head.logits(batch)
        logps = self._logps(found)
        rows = found.rows.to(weights.device)
        loss = -(weights[rows].to(logps.device) * logps).sum()
        if reference is None:
            return loss, None
        divergence = k3_divergence(logps, reference)
        loss = loss + beta * (shares[rows].to(logps.device) * divergence).sum()
        return loss, float(divergence.detach().mean())

    def _logps(self, found: LabelLogits) -> Tensor:
        """(tokens,) float32, at the temperature that was sampled with."""
        logps = (found.logits / self._options.temperature).log_softmax(-1)
        return logps.gather(1, found.targets[:, None])[:, 0]

    def _reference_logits(self, batch: dict[str, Tensor]) -> LabelLogits:
        model = self._model
        off = self._method.disabled(model) if self._named is None else use(model, self._named)
        with torch.no_grad(), evaluating(model), off:
            found = self.label_head.logits(batch)
        torch.clear_autocast_cache()
        return found

    def _check_sampled(self, group: _Group) -> None:
        """The tokens must be as likely where they are learned as they were where they were drawn.

        Otherwise the gradient is not the policy's: positions, padding or an adapter differ.
        """
        self._checked = True
        batch = self._batch([_row(group.prompt, answer) for answer in group.answers])
        with torch.no_grad(), evaluating(self._model):
            learned = self._logps(self.label_head.logits(batch)).cpu()
        torch.clear_autocast_cache()
        drawn = torch.tensor([logp for answer in group.answers for logp in answer.logps])
        half = torch.is_autocast_enabled(self._model.device.type) or any(
            p.dtype != torch.float32 for p in self._model.parameters()
        )
        allowed = _TOLERANCE_HALF if half else _TOLERANCE
        distance = float((learned - drawn).abs().mean())
        if not distance <= allowed:
            raise TrainingError(
                "sampled tokens have another probability where they are learned",
                where="the first batch of task grpo",
                expected=f"log-probabilities that agree to {allowed:g} nats per token",
                found=format_number(distance),
                remedy="this is an error of lorakit or of the model's code: report it with the "
                "config",
            )


def _row(prompt: list[int], answer: Written) -> Example:
    return Example(prompt + answer.ids, [IGNORED] * len(prompt) + answer.ids)
