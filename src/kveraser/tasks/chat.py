"""The chat form: an example as a conversation, written by a model's own chat template.

Knows: examples, chat templates. Does not know about models, caches or metrics.

Instruct models answer sensibly only so. What comes out is an example again, with the template's markup in its texts: its parts are
encoded apart as ever, so that spans begin and end with tokens, and all markup belongs to what stays. A span that is a whole message
leaves an empty one.

    kept    <|im_start|>user\\nThe town hall is old.
    erased  The door code is 1234.
    kept    It has a tower.<|im_end|>\\n<|im_start|>assistant\\nOK.<|im_end|>\\n
    asked   <|im_start|>user\\nWhat is the door code?<|im_end|>\\n<|im_start|>assistant\\nThe door code is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from kveraser.context.chat import Message, render
from kveraser.errors import OptionError
from kveraser.tasks.base import EraseExample, Markup, Piece, Turn, alternating, asked, in_fields

_READ = Turn("assistant", (("OK.", False),))
_BRIEFLY = "Answer with as few words as possible."
_MARK = "kveraser-{}-here"


class ChatForm:
    """Writes examples through a tokenizer's chat template.

    Attributes:
        ends: tokens that end a reply: the special one that the template puts behind it, if there is one.

    Raises:
        OptionError: the tokenizer has no chat template.
        ContextError: the template refuses a conversation of user and assistant.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise OptionError(
                f"the tokenizer {name} has no chat template, so nothing can be asked in chat form; leave the option away, "
                "take an instruct model, or set tokenizer.chat_template"
            )
        self._tokenizer = tokenizer
        _, _, behind = self._markup(["user", "assistant"], prompt=False)
        closing = tokenizer.encode(behind, add_special_tokens=False)
        special = [token for token in closing if not tokenizer.decode([token], skip_special_tokens=True)]
        self.ends: tuple[int, ...] = tuple(special[:1])
        _, _, self._between, _ = self._markup(["user", "assistant", "user"], prompt=True)

    def __call__(self, examples: Sequence[EraseExample]) -> list[EraseExample]:
        """Examples as one conversation, in which each is asked about at the end.

        The first one's texts begin with what the template puts before everything; joined in order, the parts of all of
        them are the context.

        Raises:
            OptionError: the template changes what is said, so that nobody can tell where it stands.
        """
        turns = [_stripped(turn) for example in examples for turn in example.turns or _as_turns(example)]
        roles = [turn.role for turn in turns]
        *before, rest = self._markup([*roles, "user"], prompt=True)
        end = self._markup(roles, prompt=False)[-1]  # behind the last message of the context
        end = end if before[-1].startswith(end) else ""
        opening = before.pop().removeprefix(end)
        written = iter(zip(before, turns, strict=True))
        found = []
        for index, example in enumerate(examples):
            pieces: list[Piece] = []
            for markup, turn in (next(written) for _ in example.turns or _as_turns(example)):
                pieces += [(markup, False), *turn.pieces]
            if index == len(examples) - 1:
                pieces.append((end, False))
            words, lead = _request(example)
            chat = Markup(opening, rest, self._between, words, lead)
            found.append(
                replace(
                    example,
                    **in_fields(alternating(pieces)),
                    question=f"{opening}{words}{rest}{lead}",
                    chat=chat,
                    gap=" " if lead else "",
                    continuation="",
                    turns=(),
                    request=None,
                )
            )
        self._check(turns, found)
        return found

    def _markup(self, roles: Sequence[str], *, prompt: bool) -> list[str]:
        """What stands before, between and behind the contents of messages."""
        marks = [_MARK.format(index) for index in range(len(roles))]
        left = self._render(list(zip(roles, marks, strict=True)), prompt)
        found = []
        for mark in marks:
            before, there, left = left.partition(mark)
            if not there:
                raise OptionError(
                    "the chat template does not show every message as it is, so spans cannot be told in it"
                )
            found.append(before)
        return [*found, left]

    def _render(self, messages: Sequence[tuple[str, str]], prompt: bool) -> str:
        return render(self._tokenizer, [Message(role, content) for role, content in messages], prompt=prompt)

    def _check(self, turns: Sequence[Turn], found: Sequence[EraseExample]) -> None:
        said = [(turn.role, "".join(text for text, _ in turn.pieces)) for turn in turns]
        context = "".join(text for example in found for text, _ in example.parts)
        for example in found:
            assert example.chat is not None
            wanted = self._render([*said, ("user", example.chat.words)], prompt=True) + example.chat.lead
            if context + example.question != wanted:
                raise OptionError(
                    "the chat template changes what messages say (or what stands between them, depending on it), so spans "
                    "cannot be told in it"
                )


def _as_turns(example: EraseExample) -> tuple[Turn, ...]:
    """A context that is one text: a user gives it to read."""
    return Turn("user", tuple(example.parts)), _READ


def _request(example: EraseExample) -> tuple[str, str]:
    """The question as a user's message, and how the reply begins."""
    words, lead = asked(example.question)
    if example.request is not None:
        return example.request
    return (words, lead) if lead else (f"{words}\n{_BRIEFLY}", "")


def _stripped(turn: Turn) -> Turn:
    """The turn without blanks around what it says: many templates take them away."""
    pieces = list(turn.pieces)
    while pieces and not pieces[0][0].strip():
        pieces.pop(0)
    while pieces and not pieces[-1][0].strip():
        pieces.pop()
    if pieces:
        pieces[0] = (pieces[0][0].lstrip(), pieces[0][1])
        pieces[-1] = (pieces[-1][0].rstrip(), pieces[-1][1])
    return Turn(turn.role, tuple(pieces))
