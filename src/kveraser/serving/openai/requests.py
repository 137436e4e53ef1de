"""From the body of a request to a prompt: rendered, tokenised, with OpenAI's defaults.

Knows: bodies, the tokenizer, the service's limits. Does not know about HTTP or what becomes of a prompt.
"""

from __future__ import annotations

from jinja2 import TemplateError

from kveraser.serving.completion import Prompt
from kveraser.serving.errors import ApiError
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
    prompt = Prompt(owner, ids, body.kveraser.policy or service.options.policy, sampling)
    service.check(prompt)
    return prompt


def completion_prompt(service: Service, body: CompletionRequest, owner: str) -> Prompt:
    """The prompt of a text completion.

    Raises:
        ApiError: a token id that the model does not have.
        ContextError: it can never be answered: no tokens, or too many.
    """
    ids = service.tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
    if any(token >= service.vocabulary for token in ids):
        raise ApiError(400, f"a token id is outside the vocabulary of {service.vocabulary}", param="prompt")
    sampling = body.sampling(body.max_tokens or 16, body.logprobs)
    prompt = Prompt(owner, tuple(ids), body.kveraser.policy or service.options.policy, sampling)
    service.check(prompt)
    return prompt


def _chat_ids(service: Service, body: ChatRequest) -> tuple[int, ...]:
    entries = [message.entry() for message in body.messages]
    try:
        text = service.tokenizer.apply_chat_template(entries, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ApiError(400, f"the chat template refuses the messages: {error}", param="messages") from error
    return tuple(service.tokenizer.encode(str(text), add_special_tokens=False))
