from __future__ import annotations

import pytest
import torch

from lorakit.errors import LorakitError, RequestError
from lorakit.serve.request import SamplingOptions
from lorakit.serve.sampler import Chosen, RowSampler, choose


def rows(*options: dict) -> list[RowSampler]:
    return [RowSampler(SamplingOptions(**one)) for one in options]


def tokens(found: list) -> list[int]:
    assert all(isinstance(one, Chosen) for one in found)
    return [one.token for one in found]


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.randn(3, 50)
    assert tokens(choose(logits, rows({}, {}, {}))) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_zero(temperature: float, cut: dict) -> None:
    logits = torch.randn(20, 50) * 30
    row = rows({"temperature": temperature, "seed": 1, **cut})[0]
    found = [tokens(choose(step[None], [row]))[0] for step in logits]
    assert found == logits.argmax(-1).tolist()


def test_a_seed_draws_the_same_in_every_batch() -> None:
    logits = torch.randn(40, 3, 60)
    options = {"temperature": 1.3, "seed": 4}
    alone, together = rows(options)[0], rows({"temperature": 1.0}, options, {})
    first = [tokens(choose(step[1:2], [alone]))[0] for step in logits]
    second = [tokens(choose(step, together))[1] for step in logits]
    assert first == second
    assert len(set(first)) > 5
    other = rows({**options, "seed": 5})[0]
    assert [tokens(choose(step[1:2], [other]))[0] for step in logits] != first


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    row = rows({"temperature": 0.5, "seed": 0})[0]
    drawn = torch.tensor([tokens(choose(logits, [row]))[0] for _ in range(4000)])
    found = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(found, (logits[0] / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.log(torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]]))

    def drawn(**options: object) -> set[int]:
        row = rows({"temperature": 1.0, "seed": 1, **options})[0]
        return {tokens(choose(logits, [row]))[0] for _ in range(300)}

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.65) == {1, 3}
    assert drawn(top_p=0.75) == {1, 2, 3}
    assert drawn(top_p=0.01) == {1}
    # top_p is a share of what top_k has kept: 0.4 of 0.7.
    assert drawn(top_k=2, top_p=0.5) == {1}


def test_top_p_over_a_wide_flat_vocabulary_reaches_beyond_the_first_look() -> None:
    logits = torch.zeros(1, 5000)
    row = rows({"temperature": 1.0, "top_p": 0.9, "seed": 2})[0]
    drawn = [tokens(choose(logits, [row]))[0] for _ in range(200)]
    assert max(drawn) > 2000


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(1, 30)
    own = logits[0].log_softmax(-1)
    row = RowSampler(SamplingOptions(temperature=2.0, top_k=3, seed=0, logprobs=5))
    found = choose(logits, [row])[0]
    assert isinstance(found, Chosen)
    assert found.logprob == pytest.approx(float(own[found.token]), abs=1e-6)
    assert [token for token, _ in found.top] == own.topk(5).indices.tolist()
    assert [p for _, p in found.top] == pytest.approx(own.topk(5).values.tolist(), abs=1e-6)
    alone = choose(logits, rows({"logprobs": 0}))[0]
    assert isinstance(alone, Chosen)
    assert alone.top == ()
    assert alone.logprob is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_finite_logits_fails_alone(bad: float) -> None:
    logits = torch.randn(3, 10)
    logits[1, 4] = bad
    found = choose(logits, rows({}, {}, {"temperature": 1.0, "seed": 0}))
    assert isinstance(found[1], LorakitError)
    assert isinstance(found[0], Chosen)
    assert isinstance(found[2], Chosen)


class _Even:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> torch.Tensor:
        return torch.arange(8) % 2 == 0

    def accept(self, token: int) -> None:
        self.seen.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_rules_tokens_out(temperature: float) -> None:
    # The constraint knows 8 tokens, the model has 10: what it does not know is ruled out.
    even = _Even()
    row = RowSampler(SamplingOptions(temperature=temperature, seed=0), even)
    free = RowSampler(SamplingOptions())
    for _ in range(20):
        logits = torch.randn(2, 10)
        logits[:, 9] = 20.0
        found = tokens(choose(logits, [row, free]))
        assert found[0] in (0, 2, 4, 6)
        assert found[1] == 9
    assert len(even.seen) == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("stop", ("",)),
        ("logprobs", 21),
        ("seed", 2**70),
    ],
)
def test_options_that_cannot_be_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingOptions(**{name: value})  # type: ignore[arg-type]
    assert caught.value.where == name
