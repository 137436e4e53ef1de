"""How long a context may be, and the memory that it takes.

Knows: the sizes of one model, the memory budget. Does not know which contexts there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.errors import ContextError, ContextLengthError
from kveraser.model.view import kv_shape, model_dtype, text_config

_GROWTH = 1.5  # a cache layer that grows takes up to this much more than it needs
_COMPOSED = 4  # characters that a tokenizer may compose to one before it looks for tokens


@dataclass(frozen=True)
class Limits:
    """What fits.

    Attributes:
        context_length: tokens that the model can see at once.
        token_bytes: memory of the keys and values of one token.
        budget: bytes of keys and values, all contexts together.
        token_characters: of text that one token may stand for, at most.
    """

    context_length: int
    token_bytes: int
    budget: int
    token_characters: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, budget: int) -> Limits:
        """The limits of a model."""
        config = text_config(model)
        layers, heads, size = kv_shape(model)
        token_bytes = int(2 * layers * heads * size * model_dtype(model).itemsize)
        longest = max(map(len, tokenizer.get_vocab()))
        return cls(int(config.max_position_embeddings), token_bytes, budget, longest * _COMPOSED)

    def bytes_for(self, tokens: int) -> int:
        """Memory that a context of so many tokens may take."""
        return int(tokens * self.token_bytes * _GROWTH)

    @property
    def longest(self) -> int:
        """Tokens of the longest context that fits."""
        return min(self.context_length, int(self.budget / (self.token_bytes * _GROWTH)))

    def check_text(self, *texts: str) -> None:
        """Refuse text that can never fit by its length alone: turning it into tokens may take longer than all else.

        Raises:
            ContextLengthError: it has more characters than the longest tokens could stand for.
        """
        characters, most = sum(map(len, texts)), self.context_length * self.token_characters
        if characters > most:
            raise ContextLengthError(
                f"{characters} characters are more than fit into the model's context length of {self.context_length} "
                f"tokens, whatever they are (at most {most})"
            )

    def check(self, tokens: int, said: str | None = None, *, copies: int = 1) -> None:
        """Refuse a context that can never fit.

        Args:
            said: the number of tokens in words.
            copies: so many contexts of that length are needed at once.

        Raises:
            ContextLengthError: it is longer than the model's context length.
            ContextError: it takes more than the whole budget.
        """
        if tokens > self.context_length:
            raise ContextLengthError(
                f"{said or f'{tokens} tokens'} are more than the model's context length of {self.context_length} tokens"
            )
        if self.bytes_for(tokens) * copies > self.budget:
            times = f"{copies} times " if copies > 1 else ""
            raise ContextError(
                f"{times}{tokens} tokens do not fit into the cache budget of {self.budget} bytes; "
                "fewer tokens or a server with a larger --cache-budget are needed"
            )
