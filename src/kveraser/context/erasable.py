"""`ErasableContext`: a live context of text and chat messages, from which spans can be erased.

Knows: tokenizers, chat messages, session files, on top of `TokenContext`. Does not know how erasing works.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.cache import GrowableLayer, append, cache_length, get_marks, snapshot, truncate
from kveraser.context.chat import Message, added_by, new_message, reply_prompt
from kveraser.context.session_file import SessionState, read_session, write_session
from kveraser.context.text import any_text, decode, find_text, located
from kveraser.context.token_context import TokenContext
from kveraser.eraser import KVEraser
from kveraser.errors import ContextError
from kveraser.methods import EraseMethod, EraseReceipt
from kveraser.readers import Text
from kveraser.spans import Span

What = Span | str | Iterable[Span | str]


class ErasableContext(TokenContext):
    """A context that a model has read, from which spans can be taken out again.

    Args:
        model: a causal language model; it is used and left as it is.
        tokenizer: its tokenizer; None for a context of token ids only.
        eraser: for `kveraser` and `auto`; None takes the one that ships for the model, if any.

    Raises:
        UnsupportedCacheError: a model whose cache cannot be edited.
        EraserMismatchError: an eraser of another model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, eraser: KVEraser | None = None
    ) -> None:
        super().__init__(model, eraser)
        self.tokenizer = tokenizer
        self._messages: list[Message] = []
        self._message_spans: list[Span] = []
        self._folders: set[Path] = set()

    # -- growing -------------------------------------------------------------------------------------------------

    def append(self, text: str | Sequence[int] | Tensor) -> Span:
        """Process text (or token ids) at the end of the context; returns its span, valid for ever.

        A model's beginning-of-text token is put before the first text when its tokenizer does so.

        Raises:
            ContextError: empty text, no tokenizer, an id outside the vocabulary.
        """
        if not isinstance(text, str):
            return self.append_ids(text)
        with self._lock:
            ids = self._encode(text, first=len(self) == 0)
            added = len(ids) - len(self._encode(text))
            span = self.append_ids(ids)
            return Span(span.start + added, span.end) if 0 < added < len(span) else span

    def append_message(self, role: str, content: str, *, id: str | None = None) -> Span:
        """Process one chat message; returns the span of its content alone (the template's markup stays out of it).

        Args:
            id: a name by which the message can be erased.

        Raises:
            ContextError: an id that is taken, no chat template, or one that is not prefix-stable.
        """
        with self._lock:
            message = new_message(self._messages, role, content, id)
            rendered = added_by(self._require_tokenizer(), self._messages, message)
            ids, offsets = self._encode_with_offsets(rendered.text)
            inside = [
                i
                for i, (a, b) in enumerate(offsets)
                if b > rendered.content_start and a < rendered.content_end and b > a
            ]
            span = self.append_ids(ids)
            content_span = Span(span.start + inside[0], span.start + inside[-1] + 1)
            self._messages.append(message)
            self._message_spans.append(content_span)
            return content_span

    # -- erasing -------------------------------------------------------------------------------------------------

    def erase(
        self, what: What, method: str | EraseMethod | KVEraser = "kveraser", *, undo: bool = True
    ) -> EraseReceipt:
        """Take spans out of the context.

        Args:
            what: a span (ledger positions, as `append` returned them), a message id, a text that occurs once, or
                several of these.
            method: a name (see `kveraser.methods()`), an `EraseMethod` or a `KVEraser`.
            undo: keep what `restore` needs in the receipt.

        Raises:
            SpanError: out of range, empty, reversed, overlapping an erased span, text not found or found twice.
            EraserMismatchError: no eraser for this model. In every case nothing was changed.
        """
        with self._lock:
            wanted = [what] if isinstance(what, Span | str) else list(what)
            return self.erase_spans([self.locate(entry) for entry in wanted], method, undo=undo)

    def readers(self, what: What) -> Tensor:
        """How much each token has attended to something: who would have to be recomputed to erase it.

        Args:
            what: as for `erase`.

        Returns:
            `(positions,)` float32, one for each ledger position: a share of its attention, the largest of any head, mean
            over layers; 0 before the first span, in the spans, and for what is erased.

        Raises:
            SpanError: as for `erase`.
            CalibrationError: keys and values tell too little.
        """
        with self._lock:
            wanted = [what] if isinstance(what, Span | str) else list(what)
            return self.readers_of([self.locate(entry) for entry in wanted])

    def locate(self, what: Span | str) -> Span:
        """The ledger span meant by a span, a message id, or a text that occurs once.

        Raises:
            SpanError: neither a message id nor a text in the context, or a text that occurs more than once.
        """
        named = zip((message.id for message in self._messages), self._message_spans, strict=True)
        return located(what, named, self._find)

    def _calibration_text(self) -> Text | None:
        tokenizer = self.tokenizer
        return None if tokenizer is None else lambda: tokenizer.encode(any_text(), add_special_tokens=False)

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The text that is in the context: appended and not erased."""
        return decode(self._require_tokenizer(), self.live_ids)

    @property
    def messages(self) -> tuple[tuple[Message, Span], ...]:
        """The chat messages in order, also erased ones, each with the ledger span of its content."""
        return tuple(zip(self._messages, self._message_spans, strict=True))

    def text_of(self, span: Span) -> str:
        """The text of a span, also of an erased one; of a purged one nothing is left."""
        return decode(self._require_tokenizer(), self.ids_of(span))

    def ids_of(self, span: Span) -> list[int]:
        """The ids of a span, also of an erased one; of a purged one nothing is left."""
        return [token for token in self._ids.view[span.slice].tolist() if token >= 0]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return self._encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids, without special tokens."""
        return str(self._require_tokenizer().decode(ids, skip_special_tokens=True))

    def logits(self, text_or_ids: str | Sequence[int] | Tensor) -> Tensor:
        """Logits after each token of a text, float32 `(tokens, vocab)`; the context stays as it is."""
        return self.logits_ids(self._encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids)

    def generate(
        self,
        prompt: str | Sequence[int] | Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        keep: bool = False,
        chat: bool | None = None,
        **options: Any,
    ) -> str:
        """Continue the context and return the new text.

        Args:
            prompt: text or ids to put behind the context first; None continues as it is (the last token runs again).
            max_new_tokens: at most so many.
            keep: append prompt and answer to the context; otherwise it stays as it is.
            chat: whether the prompt is a user's message to be answered; None: if the context has messages.
            options: for `model.generate` (do_sample, temperature, ...).

        Raises:
            ContextError: an emptied context without a prompt, a user's message without content.
        """
        with self._lock:
            tokenizer = self._require_tokenizer()
            chat = (
                bool(self._messages) and not (prompt is not None and not isinstance(prompt, str))
                if chat is None
                else chat
            )
            ids: list[int] | Tensor | Sequence[int] = []
            user: Message | None = None
            text = ""
            if chat:
                if isinstance(prompt, str):
                    if not prompt.strip():
                        raise ContextError("the user's message has no content; give some, or None to go on")
                    user = Message("user", prompt)
                    text = added_by(tokenizer, self._messages, user).text
                messages = [*self._messages, user] if user else self._messages
                text += reply_prompt(tokenizer, messages)
                ids = self._encode(text)
            elif isinstance(prompt, str):
                ids = self._encode(prompt, first=len(self) == 0)
            elif prompt is not None:
                ids = prompt
            start = len(self)
            answer = self.generate_ids(ids, max_new_tokens=max_new_tokens, keep=keep, **options)
            reply = self.decode(answer)
            if keep and chat:
                self._keep_reply(user, reply, start, len(ids), answer)
            return reply

    def _keep_reply(self, user: Message | None, reply: str, start: int, prompt_length: int, answer: list[int]) -> None:
        """Enter a kept exchange into the messages and close it as the template does."""
        tokenizer = self._require_tokenizer()
        if user:
            rendered = added_by(tokenizer, self._messages, user)
            _, offsets = self._encode_with_offsets(rendered.text)
            inside = [
                i
                for i, (a, b) in enumerate(offsets)
                if b > rendered.content_start and a < rendered.content_end and b > a
            ]
            self._messages.append(user)
            self._message_spans.append(Span(start + inside[0], start + inside[-1] + 1))
        end = start + prompt_length + len(answer)
        ended = bool(answer) and answer[-1] in self._end_ids()
        said = Message("assistant", reply)
        span = Span(start + prompt_length, max(end - ended, start + prompt_length + 1))
        closing = ""
        if reply.strip():
            rendered = added_by(tokenizer, self._messages, said)
            closing = rendered.text[rendered.content_end :]
            if ended and closing.startswith(final := str(tokenizer.decode([answer[-1]]))):
                closing = closing[len(final) :]
        self._messages.append(said)
        self._message_spans.append(span)
        if closing:
            self.append_ids(self._encode(closing))

    def _end_ids(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends} if ends is not None else set()

    # -- branching -----------------------------------------------------------------------------------------------

    def prefix(self, length: int, *, take: bool = False) -> ErasableContext:
        """A new context of the first `length` live tokens, without messages, and with nothing erased in its ledger.

        Args:
            take: hand the states over instead of copying them; this context is empty afterwards.

        Raises:
            ContextError: more tokens than are exact.
        """
        with self._lock:
            known = get_marks(self.cache).approximate_from
            exact = cache_length(self.cache) if known is None else known
            if not 0 <= length <= exact:
                raise ContextError(f"the first {exact} tokens are exact, and {length} were wanted; call repair() first")
            ids = torch.tensor(self.live_ids[:length], dtype=torch.long)
            new = ErasableContext(self.model, self.tokenizer, self.eraser)
            if length and take:
                new.cache.layers.extend(GrowableLayer() for _ in self.cache.layers)
                for theirs, mine in zip(new.cache.layers, self.cache.layers, strict=True):
                    theirs.take_over(mine)
                truncate(new.cache, length)
            elif length:
                new.cache.layers.extend(GrowableLayer() for _ in self.cache.layers)
                append(new.cache, snapshot(self.cache, Span(0, length)))
            if length:
                new._register(ids)
            if take:
                self.__init__(self.model, self.tokenizer, self.eraser)  # type: ignore[misc]
            return new

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the context to a folder (safetensors and JSON), whole or not at all; an older one there is replaced.

        What `restore` would need bit-exactly is not saved: a loaded context restores by recomputing.
        """
        with self._lock:
            target = Path(folder)
            state = SessionState.of(self, self._messages, self._message_spans)
            write_session(target, state)
            self._folders.add(target.resolve())
            return target

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eraser: KVEraser | None = None,
    ) -> ErasableContext:
        """Read a saved context.

        Raises:
            SessionFileError: missing, truncated, altered, of a newer format, or of another model.
        """
        context = cls(model, tokenizer, eraser)
        state = read_session(Path(folder), model)
        state.install(context)
        context._messages = list(state.messages)
        context._message_spans = list(state.message_spans)
        context._folders.add(Path(folder).resolve())
        return context

    def _forget(self, spans: tuple[Span, ...]) -> None:
        for index, (message, span) in enumerate(zip(self._messages, self._message_spans, strict=True)):
            if any(span.overlaps(gone) for gone in spans):
                self._messages[index] = Message(message.role, "(removed)", message.id)
        for folder in self._folders:
            if folder.exists():
                write_session(folder, SessionState.of(self, self._messages, self._message_spans), overwrite=True)

    # -- tokenizer -----------------------------------------------------------------------------------------------

    def _find(self, text: str) -> Span:
        runs = [(run, self._ids.view[run.slice].tolist()) for run in self._ledger.live()]
        return find_text(self._require_tokenizer(), runs, text)

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ContextError(
                "this context has no tokenizer; give one to ErasableContext(model, tokenizer), or use token ids"
            )
        return self.tokenizer

    def _encode(self, text: str, *, first: bool = False) -> list[int]:
        ids = self._require_tokenizer().encode(text, add_special_tokens=first)
        end = self._end_ids()
        while first and ids and len(ids) > 1 and ids[-1] in end:  # some tokenizers also close the text
            ids = ids[:-1]
        return [int(token) for token in ids]

    def _encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        tokenizer = self._require_tokenizer()
        if not tokenizer.is_fast:
            raise ContextError(
                f"{type(tokenizer).__name__} gives no offsets; load the fast version of the tokenizer for chat messages"
            )
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
