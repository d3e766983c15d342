"""Which models predict every token from those before it, as learning and scoring answers needs.

An encoder with a masked-language-modelling head has logits at every position too, and a
sequence-to-sequence model reads the whole row before it writes: both would see the very answer
that they are to learn, and show a fine loss for it.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from lorakit.errors import ModelError
from lorakit.models.label_head import require_head


def require_causal(model: PreTrainedModel, *, or_seq2seq: bool = False) -> None:
    """Refuse a model that sees the tokens it is to predict; works on the meta device.

    Args:
        model: a base.
        or_seq2seq: a sequence-to-sequence model will do: it can write, and be asked.

    Raises:
        ModelError: it has no language-modelling head, or its tokens see what follows them.
    """
    require_head(model)
    if model.config.is_encoder_decoder:
        if not or_seq2seq:
            raise _sees_the_answer(
                model,
                "a sequence-to-sequence model",
                "take a causal model; attached from Python (lorakit.attach), an adapter on this "
                "one learns in a loop of your own",
            )
    elif _is_masked(model):
        raise _sees_the_answer(
            model,
            "an encoder with a head for masked tokens",
            "take another base; an encoder is trained with task: classify",
        )


def _is_masked(model: PreTrainedModel) -> bool:
    """Whether its attention looks both ways; BERT and its like can also be made decoders."""
    config = model.config
    one_way = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not one_way


def _sees_the_answer(model: PreTrainedModel, found: str, remedy: str) -> ModelError:
    name = model.config.name_or_path
    return ModelError(
        "this model reads what it should predict: it cannot learn or score answers",
        where=f"{name} ({type(model).__name__})" if name else type(model).__name__,
        expected="a causal language model, such as smollm2-135m-instruct",
        found=found,
        remedy=remedy,
    )
