"""Where each row's prompt ends, learned from how a model with special positions is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

from lorakit.errors import StateError
from lorakit.layers.placement import ends_of_prompts
from lorakit.layers.prefix import IGNORED, PrefixTokens

Inputs = dict[str, Any]


@dataclass
class LabelsSeen:
    """Hooks around a causal language model that computes its own loss: its labels say it."""

    tokens: PrefixTokens
    before: list[Tensor | None] = field(default_factory=list[Tensor | None])

    def enter(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: Inputs) -> None:
        """Forward pre-hook."""
        self.before.append(self.tokens.ends)
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            self.tokens.ends = ends_of_prompts(labels, IGNORED)

    def leave(self, _model: nn.Module, _args: tuple[Any, ...], _output: object) -> None:
        """Forward hook, also called after an error."""
        self.tokens.ends = self.before.pop()


@dataclass(frozen=True)
class GenerateBehindPrompt:
    """`model.generate`, with the special positions told how wide the prompt is.

    Without a cache the model is called with prompt and answer together at every step, and the
    infix has to stay between the two.
    """

    model: PreTrainedModel
    tokens: PrefixTokens

    def __call__(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """See transformers' `generate`; one to one.

        Raises:
            StateError: a way of generating that special positions do not support.
        """
        # The class's own: the instance's is this object.
        generate: Any = partial(type(self.model).generate, self.model)  # pyright: ignore[reportAttributeAccessIssue]
        if not self.tokens.enabled:
            return generate(inputs, generation_config, **kwargs)
        self._refuse(generation_config or self.model.generation_config, kwargs)
        given = next(
            (
                prompt
                for prompt in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
                if isinstance(prompt, Tensor)
            ),
            None,
        )
        width = 1 if given is None else given.shape[1]  # the start token alone
        with self.tokens.prompt_width(width):
            return generate(inputs, generation_config, **kwargs)

    def _refuse(self, settings: GenerationConfig, kwargs: Inputs) -> None:
        def value(name: str) -> Any:
            given = kwargs.get(name)
            return settings.to_dict().get(name) if given is None else given

        cache = kwargs.get("past_key_values")
        reason = None
        if kwargs.get("assistant_model") is not None or value("prompt_lookup_num_tokens"):
            reason = "assisted decoding rolls the cache back and does not know the positions in it"
        elif isinstance(cache, Cache) and int(cache.get_seq_length()):
            reason = "generate counts a filled cache as tokens, and some of it is special positions"
        elif value("cache_implementation") in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            reason = "a static cache has no room for the special positions"
        elif value("prefill_chunk_size"):
            reason = "the prompt comes in parts, and the infix belongs behind its last one"
        if reason is not None:
            raise StateError(
                f"this way of generating is not possible with a prefix: {reason}",
                where="generate",
                expected="greedy, sampling or beam search with a new dynamic cache, or none",
                remedy="leave these settings at their defaults, or start from a new cache",
            )
