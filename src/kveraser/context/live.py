"""`LiveContext`: a live context of text and chat messages over any backend, from which spans can be erased.

Knows: tokenizers, chat messages, session files, on top of `TokenContext`. Does not know how erasing works, or which engine it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kveraser.context.backend import LiveBackend
from kveraser.context.chat import Message
from kveraser.context.decoding import GREEDY, Drawing, Watch
from kveraser.context.messages import Conversation
from kveraser.context.session import Session
from kveraser.context.session_folder import Version, check_purge, purge_session, read_session, write_session
from kveraser.context.talking import Talking
from kveraser.context.text import any_text, decode, find_text, several
from kveraser.context.token_context import TokenContext
from kveraser.eraser import KVEraser
from kveraser.errors import ContextError, OptionError, SpanError
from kveraser.interrupts import uninterrupted
from kveraser.methods import EraseMethod, EraseReceipt
from kveraser.readers import Text
from kveraser.spans import Span

What = Span | str | Iterable[Span | str]


class LiveContext(Talking, TokenContext):
    """A context that a model has read, from which spans can be taken out again.

    Args:
        backend: an empty one.
        tokenizer: of its model, transformers' own or one that quacks like it; None for a context of token ids only.
        eraser: as of `TokenContext`.
    """

    def __init__(self, backend: LiveBackend, tokenizer: Any = None, eraser: Any = None) -> None:
        super().__init__(backend, eraser)
        self.tokenizer = tokenizer

    def _begin(self) -> None:
        super()._begin()
        self._chat = Conversation()
        self._folders: dict[Path, Version] = {}
        self._to_purge: set[Path] = set()

    # -- growing -------------------------------------------------------------------------------------------------

    def append(self, text: str | Sequence[int] | Tensor) -> Span:
        """Process text (or token ids) at the end of the context; returns its span, valid for ever.

        A model's beginning-of-text token is put before the first text when its tokenizer does so.

        Raises:
            ContextError: empty text, no tokenizer, an id outside the vocabulary, or no room.
            OptionError: ids that are no integers. In every case nothing was changed.
        """
        if not isinstance(text, str):
            return self.append_ids(text)
        with self._lock:
            ids = self._encode(text, first=len(self) == 0)
            added = len(ids) - len(self._encode(text))
            span = self.append_ids(ids)
            return Span(span.start + added, span.end) if 0 < added < len(span) else span

    def _grow(self, ids: list[int]) -> Span:
        return self.append_ids(ids)

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
            spans = [span for entry in several(what) for span in self._standing(entry)]
            return self.erase_spans(spans, method, undo=undo)

    def replace(
        self,
        what: What,
        new: str | Sequence[int] | Tensor,
        method: str | EraseMethod | KVEraser = "kveraser",
        *,
        undo: bool = True,
    ) -> EraseReceipt:
        """Let something say another text, as if the context had always said that.

        The new text has ledger positions of its own, `receipt.replacement`: valid for ever, to be erased or replaced like any other.
        Those of the old text stay its own. A message is replaced as often as wanted by its id. Equal text changes nothing, an empty
        one erases.

        Args:
            what: as for `erase`; of several, the first says the new text and the others are erased.
            new: text or token ids. Of the tokens of a text or a message that say more than it (such as the space before it), the
                rest stays; a span is replaced as it is.
            method, undo: as for `erase`.

        Raises:
            SpanError, EraserMismatchError: as for `erase`.
            OptionError: a method that only erases, or cannot be done here.
            ContextError: an id outside the vocabulary, or no room. In every case nothing was changed.
        """
        with self._lock:
            spans = [span for entry in several(what) for span in self._standing(entry)]
            if isinstance(new, str):
                new = self._encode(self.fitted(what, new) if isinstance(what, str) and new else new)
            return self.replace_spans(spans, new, method, undo=undo)

    def fitted(self, what: Span | str, new: str) -> str:
        """A new text in the place of a text or a message, with what else the tokens of that say before and behind it.

        Raises:
            SpanError: as `locate`.
        """
        if isinstance(what, Span):
            return new
        held = self.text_of(self.locate(what))
        content = next((message.content for message, _ in self._chat if message.id == what), what)
        for said in (content, content.strip()):
            before, found, behind = held.partition(said)
            if found:
                return f"{before}{new}{behind}"
        return new

    def _standing(self, what: Span | str) -> tuple[Span, ...]:
        """What `erase` takes as ledger spans; a message is what is said in its place now."""
        span = self.locate(what)
        if isinstance(what, Span):
            return (span,)
        found = self._ledger.standing(span)
        if found != (span,) and not any(map(self._ledger.live, found)):
            raise SpanError(
                f"nothing is left of {what!r}: what had replaced it is erased, too; restore that erase first"
            )
        return found

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
            return self.readers_of([span for entry in several(what) for span in self._standing(entry)])

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
        return tuple(self._chat)

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
            options: as of `generate_ids`.

        Raises:
            ContextError: an emptied context without a prompt, a user's message without content, or no room.
            OptionError: token ids as a user's message.
        """
        run = partial(self.generate_ids, max_new_tokens=max_new_tokens, keep=keep, **options)
        return self._answered(prompt, chat, keep, run)

    def reply(
        self,
        prompt: str | Sequence[int] | Tensor | None = None,
        drawing: Drawing = GREEDY,
        *,
        max_new_tokens: int = 64,
        keep: bool = False,
        chat: bool | None = None,
        watch: Watch | None = None,
    ) -> str:
        """Continue the context and return the new text: as `generate`, token by token as `reply_ids` does it."""
        run = partial(self.reply_ids, drawing=drawing, max_new_tokens=max_new_tokens, keep=keep, watch=watch)
        return self._answered(prompt, chat, keep, run)

    def prompt_ids(self, prompt: str | Sequence[int] | Tensor | None, *, chat: bool | None = None) -> list[int]:
        """What `generate` puts behind the context for a prompt, in ids: in a chat, a user's message and the beginning of its reply.

        Raises:
            ContextError: a user's message without content.
            OptionError: token ids as a user's message.
        """
        with self._lock:
            return self._asked(prompt, chat)[0]

    def _asked(
        self, prompt: str | Sequence[int] | Tensor | None, chat: bool | None
    ) -> tuple[list[int], Message | None, bool]:
        """The ids of a prompt, the user's message that it is, and whether this is a chat."""
        text = isinstance(prompt, str) or prompt is None
        if chat is None:
            chat = bool(self._chat) and text
        if not chat:
            if isinstance(prompt, str):
                return self._encode(prompt, first=len(self) == 0), None, False
            return [] if prompt is None else torch.as_tensor(prompt).tolist(), None, False
        if prompt is not None and not isinstance(prompt, str):
            raise OptionError(
                f"chat=True takes a user's message as text, got {len(prompt)} token ids; give the text, or chat=False to go on "
                "behind the ids"
            )
        tokenizer = self._require_tokenizer()
        user = self._chat.question(prompt) if isinstance(prompt, str) else None
        added = self._chat.text_of(tokenizer, user) if user else ""
        return self._encode(added + self._chat.reply_prompt(tokenizer, user)), user, True

    def _answered(
        self,
        prompt: str | Sequence[int] | Tensor | None,
        chat: bool | None,
        keep: bool,
        run: Callable[[list[int]], list[int]],
    ) -> str:
        with self._lock:
            self._require_tokenizer()
            ids, user, talk = self._asked(prompt, chat)
            start = len(self)
            with self._growing():
                answer = run(ids)
                reply = self.decode(answer)
                if not (keep and talk):
                    return reply
                ended = bool(answer) and self.backend.ends(answer[-1])
                inside = self._chat.ids_of(self.tokenizer, user)[1] if user else None
                closing = self._chat.closing(self.tokenizer, reply, answer, user, ended=ended)
                if closing:
                    self.append_ids(self._encode(closing))
            with uninterrupted():
                if user and inside:
                    self._chat.enter(user, inside.shift(start))
                self._chat.enter_reply(reply, start + len(ids), len(answer), ended=ended)
            return reply

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the context to a folder, whole or not at all; another session there is replaced, and cannot be read any more.

        It is encrypted with a key that is kept beside it: whoever can read the folder can read the session, until a purge
        overwrites the key of all that was written before. What `restore` would need bit-exactly is not saved: a loaded context
        restores by recomputing.

        Raises:
            SessionFileError: the path is a file.
        """
        with self._lock:
            target = Path(folder)
            known = target.resolve()
            version = write_session(
                target, Session.of(self, self._chat), self._folders.get(known), renew=known in self._to_purge
            )
            self._folders[known] = version
            self._to_purge.discard(known)
            return target

    def _read(self, folder: str | PathLike[str]) -> None:
        """Fill this empty context with the session in a folder."""
        self._install(*read_session(Path(folder), self.backend.stored_as), folder)

    def _install(self, session: Session, version: Version, folder: str | PathLike[str]) -> None:
        """Put a session that was read from a folder into this empty context."""
        self._chat = session.install(self, str(folder))
        self._folders[Path(folder).resolve()] = version

    def _check_forget(self) -> None:
        for folder, version in self._folders.items():
            check_purge(folder, version)

    def _forget(self, spans: tuple[Span, ...]) -> None:
        self._chat.forget(spans)
        self._to_purge |= set(self._folders)

    def _forget_files(self) -> bool:
        if not self._to_purge:
            return False
        session = Session.of(self, self._chat)
        failed: Exception | None = None
        for folder in sorted(self._to_purge):
            try:
                version = purge_session(folder, session, self._folders[folder])
            except Exception as error:  # the others shall be purged all the same
                failed = error
                continue
            self._to_purge.discard(folder)
            if version is None:
                del self._folders[folder]
            else:
                self._folders[folder] = version
        if failed is not None:
            raise failed
        return True

    # -- tokenizer -----------------------------------------------------------------------------------------------

    def _find(self, text: str) -> Span:
        runs = ((run, self._ids.view[run.slice].tolist()) for run in self._ledger.live())
        return find_text(self._require_tokenizer(), runs, text)

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ContextError(
                "this context has no tokenizer; give one to ErasableContext(model, tokenizer), or use token ids"
            )
        return self.tokenizer

    def _encode(self, text: str, *, first: bool = False) -> list[int]:
        ids = self._require_tokenizer().encode(text, add_special_tokens=first)
        while first and len(ids) > 1 and self.backend.ends(ids[-1]):  # some tokenizers also close the text
            ids = ids[:-1]
        return [int(token) for token in ids]
