"""A classification head on every kind of base: same seed same head, nothing else made up."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tiny_classifiers
import tiny_models
from lorakit.errors import LorakitWarning, ModelError
from lorakit.models.empty import empty_classifier
from lorakit.models.load import load_base_model, load_config, load_tokenizer
from lorakit.models.task_head import (
    ClassificationHead,
    head_modules,
    own_classes,
    padding_id,
    unstored_modules,
)

ALL = (*tiny_classifiers.ENCODERS, *tiny_classifiers.DECODERS)
HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "deberta-v2": ("pooler", "classifier"),
    "llama": ("score",),
    "gpt2": ("score",),
    "qwen2": ("score",),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: tiny_classifiers.write_base(root / name, name) for name in ALL}


def head(base, *names, seed=3):
    pad = padding_id(load_config(base), load_tokenizer(base))
    return ClassificationHead(names=names, pad_token_id=pad, seed=seed)


def weights_of(model):
    return {
        f"{name}.{n}": p.detach().clone()
        for name in head_modules(model)
        for n, p in model.get_submodule(name).named_parameters()
    }


@pytest.mark.parametrize("name", ALL)
def test_the_head_comes_from_its_seed_alone(bases, name):
    base = bases[name]
    first = load_base_model(base, head=head(base, "no", "maybe", "yes"))
    assert head_modules(first) == HEADS[name]
    torch.manual_seed(99)
    again = weights_of(load_base_model(base, head=head(base, "no", "maybe", "yes")))
    other = weights_of(load_base_model(base, head=head(base, "no", "maybe", "yes", seed=4)))
    for key, value in weights_of(first).items():
        torch.testing.assert_close(value, again[key], rtol=0, atol=0)
        if value.ndim > 1:
            assert not torch.equal(value, other[key])
            assert 0.01 < float(value.std()) < 0.03
        else:
            assert not value.any()
    assert first.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert first.config.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert first.config.problem_type == "single_label_classification"
    assert not first.training


@pytest.mark.parametrize("name", ALL)
def test_the_empty_model_has_the_same_shapes(bases, name):
    base = bases[name]
    wanted = head(base, "a", "b")
    empty = empty_classifier(load_config(base), wanted)
    real = load_base_model(base, head=wanted)
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_padded_batch_are_their_runs_alone(bases, name):
    base = bases[name]
    model = load_base_model(base, head=head(base, "a", "b"))
    pad = model.config.pad_token_id
    rows = [[1, 9, 10, 11, 12], [1, 13, 14]]
    ids = torch.tensor([rows[0], [*rows[1], pad, pad]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, logits in zip(rows, together, strict=True):
            alone = model(input_ids=torch.tensor([row])).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-6)


def test_a_regression_has_one_output(bases):
    model = load_base_model(bases["bert"], head=head(bases["bert"]))
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 1)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "llama"])
def test_a_regression_starts_at_the_mean_where_the_head_has_a_bias(bases, name):
    wanted = ClassificationHead(names=(), pad_token_id=0, seed=3, mean=2.75)
    model = load_base_model(bases[name], head=wanted)
    ids = torch.tensor([[1, 9, 10, 2], [1, 11, 12, 2]])
    with torch.no_grad():
        outputs = model(input_ids=ids).logits
    has_bias = any(n.endswith("bias") and p.numel() == 1 for n, p in model.named_parameters())
    assert has_bias == (name != "llama")
    expected = torch.full_like(outputs, 2.75 if has_bias else 0.0)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0.6)
    biases = {n: p for n, p in weights_of(model).items() if n.endswith("bias")}
    assert sum(float(b.abs().sum()) for b in biases.values()) == (2.75 if has_bias else 0.0)


@pytest.mark.parametrize(("names", "kept"), [(("x", "y", "z"), True), (("x", "y"), False)])
def test_a_trained_head_of_the_same_size_is_the_start(bases, tmp_path, names, kept):
    trained = load_base_model(bases["roberta"], head=head(bases["roberta"], "a", "b", "c"))
    trained.save_pretrained(tmp_path)
    wanted = ClassificationHead(names=names, pad_token_id=0, seed=8)
    if kept:
        with pytest.warns(LorakitWarning, match="a trained head of 3 outputs"):
            model = load_base_model(tmp_path, head=wanted)
        torch.testing.assert_close(weights_of(model), weights_of(trained), rtol=0, atol=0)
    else:
        model = load_base_model(tmp_path, head=wanted)
        assert weights_of(model)["classifier.out_proj.weight"].shape == (2, 32)
    assert tuple(model.config.id2label.values()) == names


def test_a_body_tensor_that_is_missing_is_still_said(bases, tmp_path):
    broken = tmp_path / "broken"
    model = load_base_model(bases["bert"])
    state = {k: v for k, v in model.state_dict().items() if "layer.1.output.dense" not in k}
    model.save_pretrained(broken, state_dict=state)
    with pytest.warns(LorakitWarning, match=r"2 tensors are not in the files.*layer\.1\.output"):
        load_base_model(broken, head=head(bases["bert"], "a", "b"))


def test_a_pooler_that_the_files_lack_starts_like_the_head(tmp_path, recwarn):
    base = tiny_classifiers.write_base(tmp_path / "masked", "bert-masked")
    wanted = head(base, "a", "b")
    first = load_base_model(base, head=wanted)
    torch.manual_seed(99)
    again = load_base_model(base, head=wanted)
    assert not [w for w in recwarn if issubclass(w.category, LorakitWarning)]
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], rtol=0, atol=0)
    lacking = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"]
    assert unstored_modules(first, lacking) == ("bert.pooler",)
    assert unstored_modules(first, lacking[:1]) == ()
    # Names that match nothing at all are not a base that lacks everything.
    assert unstored_modules(first, [name for name, _ in first.named_parameters()]) == ()


def test_the_bases_own_classes(bases):
    config = load_config(bases["bert"])
    assert own_classes(config) == ()
    trained = ClassificationHead(names=("no", "yes"), pad_token_id=0, seed=0).configured(config)
    assert own_classes(trained) == ()
    trained.architectures = ["BertForSequenceClassification"]
    assert own_classes(trained) == ("no", "yes")
    trained.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert own_classes(trained) == ()


def test_a_sequence_to_sequence_model_is_refused(tmp_path):
    tiny_models.build("t5").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot classify sequences"):
        load_base_model(tmp_path, head=ClassificationHead(names=("a", "b"), pad_token_id=0, seed=0))


def test_what_pads(bases):
    assert padding_id(load_config(bases["llama"]), load_tokenizer(bases["llama"])) == 0
    # GPT-2 has no padding token: its end of text takes the place.
    assert padding_id(load_config(bases["gpt2"]), load_tokenizer(bases["gpt2"])) == 2
    config = load_config(bases["gpt2"])
    bare = tiny_classifiers.tokenizer(pad=False)
    bare.eos_token = None
    with pytest.raises(ModelError, match="no token to pad with"):
        padding_id(config, bare)


def test_the_same_model_as_transformers_builds(bases):
    base = bases["bert"]
    ours = load_base_model(base, head=head(base, "a", "b"))
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    ids = torch.tensor([[1, 9, 10, 2]])
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
