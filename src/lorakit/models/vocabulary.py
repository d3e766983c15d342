"""Whether a model has an embedding for every token that its tokenizer makes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lorakit.errors import DataError


def require_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, highest_ids: Iterable[int]
) -> None:
    """Refuse token ids behind the model's last embedding; works on the meta device.

    Tokens that were added to a tokenizer alone have none, and looking one up fails deep in the
    model (on a GPU with an error that says nothing).

    Args:
        model: a base.
        tokenizer: that made the ids.
        highest_ids: the highest id of each batch or row; looked at only where the tokenizer has
            more tokens than the model has embeddings.

    Raises:
        DataError: with the token.
    """
    embeddings = model.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding) or len(tokenizer) <= embeddings.num_embeddings:
        return
    highest = max(highest_ids, default=0)
    if highest >= embeddings.num_embeddings:
        raise DataError(
            "the rows have a token that the model has no embedding for",
            where=model.config.name_or_path or type(model).__name__,
            expected=f"token ids below {embeddings.num_embeddings:,}",
            found=f"{tokenizer.convert_ids_to_tokens(highest)!r}, id {highest:,}, of a tokenizer "
            f"with {len(tokenizer):,} tokens",
            remedy="take the tokenizer that belongs to this base, or leave the added token out",
        )
