"""A prompt and its reply, by whatever API they come and go.

Knows: token ids, what is told of a reply. Does not know about JSON, contexts or how a reply is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kveraser.serving.contexts.reuse import Policy, Reason
from kveraser.serving.decoding import Sampling, TokenLogprob


@dataclass(frozen=True)
class Prompt:
    """Ids to be read and continued, for the owner of an API key.

    Attributes:
        max_residual: what edits in place may leave behind under `auto`; where it would be more, it is recomputed at once.
        must_forget: texts of which nothing may be left in what is cached for the owner.
    """

    owner: str
    ids: tuple[int, ...]
    policy: Policy
    sampling: Sampling
    max_residual: float | None = None
    must_forget: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReuseReport:
    """How a prompt got into a context: the object `kveraser` of a reply.

    Attributes:
        method: `prefill`, `prefix`, `full-recompute` or `kveraser`.
        exact: whether the context equals a fresh prefill.
        reason: why.
        spans: runs that have changed, in tokens of the cached conversation.
        replacements: how many tokens stand in the place of each; 0 where it was taken out.
        tokens_reused: tokens of the prompt whose states were there already and were left as they are.
        tokens_recomputed: tokens that were run through the model, steering included.
        recomputed: runs of the cached conversation that were recomputed where they are, in tokens like `spans`.
        residual: what edits left behind by their own estimate, the largest of any; 0.0 where the context is exact, None where not known.
        eraser: "trained" or "neutral", where one was used.
        forgotten: cached conversations of which something was purged; None where nothing had to be forgotten.
        seconds: until the first token could be sampled, without waiting.
    """

    method: str
    exact: bool
    reason: Reason
    spans: tuple[tuple[int, int], ...]
    tokens_reused: int
    tokens_recomputed: int
    seconds: float
    recomputed: tuple[tuple[int, int], ...] = ()
    residual: float | None = None
    eraser: str | None = None
    replacements: tuple[int, ...] = ()
    forgotten: int | None = None


@dataclass
class Reply:
    """An answer, as far as it is known."""

    reuse: ReuseReport
    prompt_tokens: int
    text: str = ""
    finish_reason: str = "length"
    stopped_by: str | None = None
    completion_tokens: int = 0
    tokens: list[TokenLogprob] = field(default_factory=list)
