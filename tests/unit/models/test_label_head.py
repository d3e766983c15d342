from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.trainer_pt_utils import LabelSmoother

import tiny_models
from lorakit.adapters.attach import attach, use
from lorakit.adapters.spec import LoraSpec
from lorakit.errors import DataError, LorakitWarning, ModelError
from lorakit.models import logits_agree
from lorakit.models.label_head import IGNORED, LabelHead, label_nll
from lorakit.models.loss_share import LossShare

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**extra: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **extra))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4))


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5)
    return Gemma2ForCausalLM(config)


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))


def opt() -> PreTrainedModel:
    return tiny_models.opt(VOCAB)


def t5() -> PreTrainedModel:
    return tiny_models.t5(VOCAB)


def bart() -> PreTrainedModel:
    model = tiny_models.bart(VOCAB)
    model.final_logits_bias.copy_(torch.randn(1, VOCAB))
    return model


CAUSAL = [llama, gpt2, gemma2, opt, cohere, granite]
ALL = [*CAUSAL, t5, bart]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def a_batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, VOCAB, (3, 9))
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[1, :7] = -100
    labels[2, 1::2] = -100  # labels with gaps; the first token is labelled and predicted by nothing
    for row, length in ((0, 8), (2, 6)):
        input_ids[row, length:] = 0
        attention_mask[row, length:] = 0
        labels[row, length:] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.mark.parametrize("make", ALL)
def test_loss_and_gradient_are_the_models_own(make) -> None:
    model = make().eval()
    batch = a_batch()
    own = model(**batch).loss
    own.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    head = LabelHead(model)
    loss = head.loss(batch)
    loss.backward()

    assert not head.full_forward
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", CAUSAL)
def test_num_items_divides_the_sum(make) -> None:
    model = make().eval()
    batch = a_batch()
    own = model(**batch, num_items_in_batch=torch.tensor(37)).loss
    for num_items in (37, torch.tensor(37)):
        loss = LabelHead(model).loss(batch, num_items=num_items)
        torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_items", [None, 37])
def test_label_smoothing_is_that_of_the_trainer(num_items: int | None) -> None:
    model = llama().eval()
    batch = a_batch()
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    own = LabelSmoother(epsilon=0.2)(
        {"logits": out.logits}, batch["labels"], shift_labels=True, num_items_in_batch=num_items
    )
    loss = LabelHead(model).loss(batch, num_items=num_items, label_smoothing=0.2)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", ALL)
def test_the_head_sees_the_labelled_positions_only_and_the_body_runs_once(make) -> None:
    model = make().eval()
    head = LabelHead(model)
    batch = a_batch()
    head.loss(batch)  # the check is behind us

    shapes: list[tuple[int, ...]] = []
    runs: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, o: shapes.append(o.shape))
    model.register_forward_hook(lambda m, a, o: runs.append(1))
    head.loss(batch)
    labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
    assert shapes == [(1, int((labels != -100).sum()), VOCAB)]
    assert runs == [1]


def test_rows_and_nll_belong_together() -> None:
    model = llama().eval()
    batch = a_batch()
    found = LabelHead(model).logits(batch)
    assert found.logits.dtype == torch.float32
    row_nll = found.row_nll(3)
    for row in range(3):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        total, num_labels = label_nll(model, **one)
        torch.testing.assert_close(row_nll[row], total, rtol=1e-5, atol=1e-5)
        assert num_labels == int((found.rows == row).sum())


def test_a_batch_without_labels_has_loss_zero_and_can_go_back() -> None:
    model = llama()
    batch = a_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = LabelHead(model).loss(batch)
    loss.backward()
    assert loss.item() == 0.0
    with pytest.raises(DataError, match="no labels"):
        LabelHead(model).loss({"input_ids": batch["input_ids"]})


def test_the_check_leaves_modes_and_random_numbers_alone() -> None:
    model = llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    batch = a_batch()
    state = torch.get_rng_state()
    first = LabelHead(model).loss(batch)
    assert [m.training for m in model.modules()] == modes
    torch.set_rng_state(state)
    own = model(**batch).loss
    torch.testing.assert_close(first, own, rtol=1e-5, atol=1e-6)  # the same dropout was drawn


def test_bfloat16_is_upcast_before_the_softmax() -> None:
    model = llama().to(torch.bfloat16).eval()
    batch = a_batch()
    loss = LabelHead(model).loss(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**batch).loss, rtol=2e-3, atol=2e-3)


def test_autocast_gives_a_float32_loss() -> None:
    model = llama().eval()
    batch = a_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head = LabelHead(model)
        loss = head.loss(batch)
        own = model(**batch).loss
    assert loss.dtype == torch.float32
    assert not head.full_forward
    torch.testing.assert_close(loss, own, rtol=5e-3, atol=5e-3)


def adapted(*targets: str) -> PreTrainedModel:
    model = llama().eval()
    attach(model, LoraSpec(r=3, alpha=9.0, targets=targets), name="a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model


def test_an_adapter_on_the_head_is_applied() -> None:
    model, batch = adapted("lm_head", "q_proj"), a_batch()
    with use(model, None):
        base = LabelHead(model).loss(batch)
    head = LabelHead(model)
    loss = head.loss(batch)
    assert not head.full_forward
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-5, atol=1e-6)
    assert abs(loss - base) > 1e-2


def test_rows_may_name_their_own_adapters() -> None:
    model, batch = adapted("q_proj"), a_batch()
    with use(model, ["a", None, "a"]):
        head = LabelHead(model)
        loss = head.loss(batch)
        own = model(**batch).loss
    assert not head.full_forward
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)


def test_rows_with_their_own_adapters_on_the_head_fall_back() -> None:
    model, batch = adapted("lm_head"), a_batch()
    with use(model, ["a", None, "a"]):
        own = model(**batch).loss
        with pytest.warns(LorakitWarning, match="each row names its own"):
            loss = LabelHead(model).loss(batch)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)


class _PositionBias(LlamaForCausalLM):
    """A model whose logits depend on the place in the sequence: the short way is wrong for it."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + torch.arange(out.logits.shape[1])[:, None] * torch.eye(VOCAB)[3]
        return out


class _Prefixed(LlamaForCausalLM):
    """A model that puts two virtual tokens in front, as prompt tuning does."""

    def forward(self, input_ids, attention_mask, **kwargs):
        prefix = self.get_input_embeddings()(torch.full((input_ids.shape[0], 2), 5))
        embeds = torch.cat([prefix, self.get_input_embeddings()(input_ids)], dim=1)
        return super().forward(
            inputs_embeds=embeds, attention_mask=F.pad(attention_mask, (2, 0), value=1), **kwargs
        )


@pytest.mark.parametrize("kind", [_PositionBias, _Prefixed])
def test_a_model_for_which_the_short_way_is_wrong_falls_back_and_says_so(kind) -> None:
    model = kind(LlamaConfig(**SMALL)).eval()
    batch = a_batch()
    head = LabelHead(model)
    with pytest.warns(LorakitWarning, match="computes all its logits"):
        loss = head.loss(batch)
    assert head.full_forward
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[:, -batch["labels"].shape[1] :]
    own = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1))
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head.loss(batch)  # said once


def test_the_first_batch_is_checked_on_a_piece_of_long_rows(monkeypatch) -> None:
    monkeypatch.setattr(logits_agree, "_NUM_COMPARED", 2 * 16 * VOCAB)
    model = llama().eval()
    ids = torch.randint(1, VOCAB, (4, 60))
    labels = torch.where(torch.arange(60) < 50, IGNORED, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    seen: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0].numel()))
    head = LabelHead(model)
    loss = head.loss(batch)
    assert not head.full_forward
    assert seen == [2 * 16, 2 * 16, 4 * 60]
    torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_a_wrapped_head_and_a_wrapped_model_are_called() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            out = self.inner(*args, **kwargs)
            return out * 1.5 if isinstance(out, torch.Tensor) else out

    model = llama().eval()
    plain = LabelHead(model).loss(a_batch_seeded())
    model.lm_head = Wrapper(model.lm_head)
    outer = Wrapper(model)
    head = LabelHead(model, call=outer)
    loss = head.loss(a_batch_seeded())
    assert not head.full_forward
    assert outer.calls == model.lm_head.calls == 3  # twice in the check, once for the loss
    assert not torch.allclose(loss, plain)


def a_batch_seeded() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return a_batch()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_without_a_head_is_refused(device: str) -> None:
    with torch.device(device):
        model = BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4))
    with pytest.raises(ModelError, match="no language-modelling head") as caught:
        LabelHead(model)
    assert caught.value.where == "BertModel"
    assert caught.value.remedy


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_losses_of_shares_are_those_of_their_rows_alone(tiny, architecture) -> None:
    model = tiny(architecture)
    batch = tiny_models.inputs(model, batch=5, length=6)
    batch.pop("decoder_input_ids", None)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :2] = -100
    batch["labels"][4] = -100
    shares = [LossShare(2), LossShare(1, 7, 0.1), LossShare(2, torch.tensor(3))]
    found = LabelHead(model).losses(batch, shares)
    head, start = LabelHead(model), 0
    for share, loss in zip(shares, found, strict=True):
        rows = {k: v[start : start + share.num_rows] for k, v in batch.items()}
        alone = head.loss(rows, num_items=share.num_items, label_smoothing=share.label_smoothing)
        torch.testing.assert_close(loss, alone)
        start += share.num_rows
