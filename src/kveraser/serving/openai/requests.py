"""From the body of a request to a prompt: rendered, tokenised, with OpenAI's defaults. It may take a while: not for the event loop.

Knows: bodies, the tokenizer, the service's limits. Does not know about HTTP or what becomes of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError

from kveraser.errors import ApiError, ContextLengthError
from kveraser.serving.completion import Prompt
from kveraser.serving.openai.protocol import ChatRequest, CompletionRequest
from kveraser.serving.service import Service


def chat_prompt(service: Service, body: ChatRequest, owner: str) -> Prompt:
    """The prompt of a chat completion.

    Raises:
        ApiError: the chat template refuses the messages.
        ContextError: it can never be answered: no tokens, or too many.
    """
    ids = _chat_ids(service, body)
    rest = service.limits.context_length - len(ids)
    limit = body.max_completion_tokens or body.max_tokens or max(min(rest, service.options.max_reply), 1)
    sampling = body.sampling(limit, (body.top_logprobs or 0) if body.logprobs else None)
    prompt = Prompt(owner, ids, body.policy or service.options.policy, sampling)
    return _checked(service, prompt, "messages")


def completion_prompt(service: Service, body: CompletionRequest, owner: str) -> Prompt:
    """The prompt of a text completion.

    Raises:
        ApiError: a token id that the model does not have.
        ContextError: it can never be answered: no tokens, or too many.
    """
    asked = body.one_prompt
    _check_text(service, "prompt", *([asked] if isinstance(asked, str) else []))
    ids = service.tokenizer.encode(asked) if isinstance(asked, str) else asked
    if any(token >= service.vocabulary for token in ids):
        raise ApiError(400, f"a token id is outside the vocabulary of {service.vocabulary}", param="prompt")
    sampling = body.sampling(body.max_tokens or 16, body.logprobs)
    prompt = Prompt(owner, tuple(ids), body.policy or service.options.policy, sampling)
    return _checked(service, prompt, "prompt")


def _checked(service: Service, prompt: Prompt, param: str) -> Prompt:
    with _from_field(param):
        service.check(prompt)
    return prompt


def _check_text(service: Service, param: str, *texts: str) -> None:
    with _from_field(param):
        service.limits.check_text(*texts)


@contextmanager
def _from_field(param: str) -> Iterator[None]:
    """Have what is too long named by the field that it comes from."""
    try:
        yield
    except ContextLengthError as error:
        error.param = param
        raise


def _chat_ids(service: Service, body: ChatRequest) -> tuple[int, ...]:
    entries = [message.entry() for message in body.messages]
    _check_text(service, "messages", *(str(value) for entry in entries for value in entry.values()))
    try:
        text = service.tokenizer.apply_chat_template(entries, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from error
    return tuple(service.tokenizer.encode(str(text), add_special_tokens=False))
