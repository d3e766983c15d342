"""Bias and penalties, against their formulas and as a client sends them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from lorakit.errors import RequestError
from lorakit.serve.request import SamplingOptions
from lorakit.serve.sampler import Chosen, RowSampler, choose
from serving import ask, byte_llama, prompts, running


def greedy(steps: torch.Tensor, row: RowSampler, *beside: RowSampler) -> list[int]:
    """One row's tokens; other rows stand in front of it."""
    found: list[int] = []
    for step in steps:
        logits = torch.cat([step.flip(-1)] * len(beside) + [step])
        choice = choose(logits, [*beside, row])[-1]
        assert isinstance(choice, Chosen)
        found.append(choice.token)
    return found


def sampler(prompt: tuple[int, ...] = (), **options: object) -> RowSampler:
    return RowSampler(SamplingOptions(**options), prompt=prompt)  # type: ignore[arg-type]


def test_penalties_by_hand() -> None:
    steps = torch.randn(30, 1, 8, generator=torch.Generator().manual_seed(1))
    before = steps.clone()
    found = greedy(
        steps, sampler(frequency_penalty=0.7, presence_penalty=-0.3), sampler(presence_penalty=2.0)
    )
    counts: Counter[int] = Counter()
    for step, token in zip(steps, found, strict=True):
        scores = [
            float(step[0, i]) - 0.7 * counts[i] + (0.3 if counts[i] else 0.0) for i in range(8)
        ]
        assert token == scores.index(max(scores))
        counts[token] += 1
    assert found != steps[:, 0].argmax(-1).tolist()
    torch.testing.assert_close(steps, before)


def test_the_repetition_penalty_is_transformers_own() -> None:
    steps = torch.randn(20, 1, 12, generator=torch.Generator().manual_seed(2))
    prompt, held = (3, 7, 3), [3, 7, 3]
    theirs = RepetitionPenaltyLogitsProcessor(1.8)
    for step, token in zip(
        steps, greedy(steps, sampler(prompt, repetition_penalty=1.8)), strict=True
    ):
        assert token == int(theirs(torch.tensor([held]), step.clone()).argmax())  # type: ignore[call-overload]
        held.append(token)


def test_a_bias_bans_and_forces_and_logprobs_stay_the_model_s() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert greedy(logits[None], sampler(logit_bias={1: -100.0})) == [2]
    (choice,) = choose(logits, [sampler(logit_bias={3: 100.0}, logprobs=1)])
    assert isinstance(choice, Chosen)
    own = logits[0].log_softmax(-1)
    assert choice.token == 3
    assert choice.logprob == pytest.approx(float(own[3]))
    assert choice.top[0][0] == 1


def test_min_p_keeps_what_is_near_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]]))

    def drawn(**options: object) -> set[int]:
        row = sampler(temperature=1.0, seed=1, **options)
        return {token for _ in range(300) for token in greedy(logits[None], row)}

    assert drawn(min_p=0.3) == {1, 2, 3}
    assert drawn(min_p=1.0) == {1}
    assert drawn(min_p=0.3, top_p=0.6) == {1, 3}
    assert drawn(min_p=0.0) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_p": 1.5},
        {"frequency_penalty": float("nan")},
        {"presence_penalty": -3.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 1e300},
        {"logit_bias": {1: 200.0}},
        {"logit_bias": {-1: 2.0}},
    ],
)
def test_what_cannot_be(wrong: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SamplingOptions(**wrong)


def test_penalised_rows_run_as_if_alone_and_stop_at_tokens() -> None:
    model = byte_llama()
    (prompt,) = prompts([6], vocab=259)
    rows = [
        {"frequency_penalty": 1.5, "temperature": 0.8, "seed": 3},
        {"repetition_penalty": 3.0, "logit_bias": {9: 4.0}},
        {},
    ]
    with running(model) as engine:
        shared = {"max_tokens": 24, "ignore_eos": True}
        alone = [ask(engine, prompt, **shared, **row).wait().tokens for row in rows]
        beside = [ask(engine, prompt, **shared, **row) for row in rows]
        assert [reply.wait().tokens for reply in beside] == alone
        assert len({tuple(one) for one in alone}) == 3
        plain = alone[2]
        ended = ask(engine, prompt, stop_token_ids=(plain[4],), **shared).wait()
        assert ended.reason == "stop"
        assert ended.tokens == plain[: plain.index(plain[4])]
        with pytest.raises(RequestError, match="logit_bias"):
            ask(engine, prompt, logit_bias={259: 1.0})
