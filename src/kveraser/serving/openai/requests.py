"""From the body of a request to a prompt: rendered, tokenised, with OpenAI's defaults. It may take a while: not for the event loop.

Knows: bodies, the tokenizer, the service's limits. Does not know about HTTP or what becomes of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kveraser.errors import ApiError, ContextLengthError
from kveraser.serving.chat.answering import Asked
from kveraser.serving.chat.offering import offered
from kveraser.serving.chat.rendering import Chat, ChatRenderer
from kveraser.serving.chat.tools import Toolset
from kveraser.serving.chat.wishes import prompt_of
from kveraser.serving.completion import Prompt
from kveraser.serving.openai.protocol import ChatRequest, CompletionRequest
from kveraser.serving.service import Service


def chat_asked(service: Service, renderer: ChatRenderer, body: ChatRequest, owner: str) -> Asked:
    """What a chat completion asks for.

    Raises:
        ApiError: the chat template refuses the messages or the tools; something of them does not fit together.
        ContextError: it can never be answered: no tokens, or too many.
    """
    messages = tuple(message.message() for message in body.messages)
    made = renderer.render(Chat(messages, _toolset(body)))
    rest = service.limits.context_length - len(made.ids)
    limit = body.max_completion_tokens or body.max_tokens or max(min(rest, service.options.max_reply), 1)
    sampling = body.sampling(limit, (body.top_logprobs or 0) if body.logprobs else None)
    prompt = prompt_of(service, owner, made.ids, sampling, body.kveraser)
    return Asked(_checked(service, prompt, "messages"), made.told, made.reader)


def _toolset(body: ChatRequest) -> Toolset:
    tools = body.offered()
    if not tools and body.tool_choice not in (None, "none"):
        raise ApiError(400, "tool_choice: there are no tools to choose from", param="tool_choice")
    return offered(tools, body.choice, "function.parameters")


def completion_asked(service: Service, body: CompletionRequest, owner: str) -> Asked:
    """What a text completion asks for.

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
    prompt = prompt_of(service, owner, ids, sampling, body.kveraser)
    return Asked(_checked(service, prompt, "prompt"))


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
