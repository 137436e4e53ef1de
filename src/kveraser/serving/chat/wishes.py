"""What a request wishes of kveraser itself, with the server's defaults where it says nothing.

Knows: the field `kveraser`, the service's options. Does not know about any API's JSON or how wishes are met.
"""

from __future__ import annotations

from collections.abc import Sequence

from kveraser.context.text import decode
from kveraser.errors import ApiError
from kveraser.serving.completion import Prompt
from kveraser.serving.contexts.forgetting import says
from kveraser.serving.decoding import Sampling
from kveraser.serving.options import Options
from kveraser.serving.service import Service


def prompt_of(service: Service, owner: str, ids: Sequence[int], sampling: Sampling, wishes: Options | None) -> Prompt:
    """The prompt of a request.

    Raises:
        ApiError: wishes that do not fit together, or that the prompt itself makes impossible.
    """
    given, defaults = wishes or Options(policy=None, max_residual=None, must_forget=None), service.options
    policy = given.policy or defaults.policy
    if given.max_residual is not None and policy != "auto":
        place = "kveraser.max_residual"
        raise ApiError(400, f"{place}: the policy is {policy!r}; a limit needs 'auto'", param=place)
    limit = defaults.max_residual if given.max_residual is None else given.max_residual
    texts = tuple(given.must_forget or ())
    said = decode(service.tokenizer, list(ids)) if texts else ""
    for index, text in enumerate(texts):
        if says(said, text):
            place = f"kveraser.must_forget[{index}]"
            raise ApiError(400, f"{place}: the request itself still says it; take it out everywhere", param=place)
    return Prompt(owner, tuple(ids), policy, sampling, limit if policy == "auto" else None, texts)
