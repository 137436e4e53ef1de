"""`VLLMSession`: a live context on a vLLM server, from which spans can be erased over HTTP.

Knows: a server with our connector, tokenizers, chat templates. Does not know how the engine keeps states, and holds none:
only token ids, and the id of the edited context they go with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kveraser.cache import Window
from kveraser.context.chat import Message
from kveraser.context.messages import Conversation
from kveraser.context.talking import Talking
from kveraser.context.text import any_text, decode, find_text, several
from kveraser.engines.vllm.client.erasing import Edit, Erasing, Served, State
from kveraser.engines.vllm.client.http import Completion, VLLMClient
from kveraser.engines.vllm.client.settings import NEUTRAL, Settings
from kveraser.engines.vllm.client.teaching import teach
from kveraser.engines.vllm.protocol import Demand, reading
from kveraser.eraser.config import Choose
from kveraser.errors import ContextError, EngineError, RestoreError
from kveraser.methods.choosing import RUN
from kveraser.methods.receipt import OfSpans
from kveraser.spans import Span, SpanLedger, merge_spans

What = Span | str | Iterable[Span | str]

_PROBE = "The café's 3rd door:\n\t{x} = 1,024"


@dataclass(frozen=True)
class VLLMReceipt(OfSpans):
    """What an erase did.

    Attributes:
        spans: what was erased, in ledger positions, sorted.
        exact: whether the context now equals one that never held the spans (they ended it, and were cut off).
        tokens_recomputed: tokens that were run through the model or the eraser.
        requests: requests sent to the server.
        edit: the edited context that is served now.
        eraser: "trained" or "neutral", which runs no erased token.
        recomputed: readers that were run again, in ledger positions.
        residual: the share of the attention that later tokens paid to the spans and whose states were not recomputed; 0.0 when
            the result is exact, None where nothing was scored.
        notes: what did not go as asked, and why.
    """

    spans: tuple[Span, ...]
    exact: bool
    tokens_recomputed: int
    requests: int
    edit: Edit | None
    eraser: str = "trained"
    recomputed: tuple[Span, ...] = field(default=(), repr=False)
    residual: float | None = None
    notes: tuple[str, ...] = ()
    _before: State | None = field(default=None, repr=False, compare=False)
    _length: int = field(default=0, repr=False)


class VLLMSession(Talking):
    """A context on a vLLM server that runs with our connector (see `kveraser.engines.vllm.server.launch`).

    Args:
        base_url: "http://host:port".
        model: as the server names it; None takes the first one.
        eraser: the server's name of an eraser's adapter; "neutral" for none, so that spans are hidden behind states that nothing
            attends to; None takes the adapter "eraser" where it is better than that, or where nothing else can be done.
        tokenizer: the model's; None loads it from where the server says the model is (a hub id or a folder).
        window, repair: instead of what the eraser was trained with; `window="full"` attends to the whole prefix. Without a trained
            one `repair=None` computes as many readers again as a span of its length deserves.
        choose: which tokens are computed again, the "readers" of the spans or the "next" ones; None takes readers where the
            server can tell them, unless its eraser was made for the others.
        block: readers are computed in runs on multiples of so many slots.
        coverage: stop when so much of the attention that went to the spans is covered, such as 0.95.
        close_gaps: whether readers, and behind hidden spans all later tokens, see no gap where a span was: the keys before it
            are then moved up, and rounded once more where they are not float32. None does so but for rounded keys with biases.
        api_key, timeout: for HTTP.

    Raises:
        EngineError: the server cannot be reached, lacks the connector or the adapter, or tokenizes otherwise.
        OptionError: an impossible value, or something that this server cannot do.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        eraser: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        window: Window | str | None = None,
        repair: int | None = None,
        choose: Choose | None = None,
        block: int = RUN,
        coverage: float | None = None,
        close_gaps: bool | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._client = VLLMClient(base_url, api_key=api_key, timeout=timeout)
        served = {entry["id"]: entry for entry in self._client.models()}
        self.model = model or next((name for name, entry in served.items() if not entry.get("parent")), "")
        wanted = [] if eraser in (None, NEUTRAL) else [str(eraser)]
        for name in (self.model, *wanted):
            if name not in served:
                raise EngineError(f"the server offers {', '.join(served)}, not {name!r}; start it with --lora-modules")
        self.tokenizer = tokenizer or _load_tokenizer(served[self.model])
        if self._encode(_PROBE) != self._client.tokenize(self.model, _PROBE):
            raise EngineError(f"the server tokenizes otherwise than this tokenizer ({self.tokenizer.name_or_path})")
        about = self._about()
        if about is None:
            raise EngineError(
                "the server runs without kveraser's connector, so nothing can be erased; start it with "
                "`python -m kveraser.engines.vllm.server`"
            )
        if about.get("learns") and choose != "next":
            with reading("the server"):
                most = int(about["max_tokens"])
            teach(self._client, self.model, self._encode(any_text()), most)
            about = self._about() or about
        found = Settings.of(
            about, served, eraser=eraser, window=window, repair=repair, choose=choose, block=block, coverage=coverage,
            close_gaps=close_gaps,
        )  # fmt: skip
        self.eraser, self.window, self.repair = found.eraser, found.window, found.repair
        self.choose, self.block, self.coverage, self.close_gaps = found.choose, block, coverage, found.close_gaps
        self._special = set(self.tokenizer.all_special_ids)
        self._state = State((), SpanLedger(), None)
        self._chat = Conversation()
        self._last: VLLMReceipt | None = None
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._state.ids)

    # -- growing -------------------------------------------------------------------------------------------------

    def append(self, text: str | Sequence[int]) -> Span:
        """Put text (or token ids) behind the context; returns its span, valid for ever. Nothing is sent yet.

        Raises:
            ContextError: empty text.
        """
        with self._lock:
            ids = self._encode(text, first=not len(self)) if isinstance(text, str) else [int(token) for token in text]
            if not ids:
                raise ContextError("there is nothing to append: the text has no tokens")
            state = self._state
            ledger = state.ledger.copy()
            span = ledger.append(len(ids))
            self._state = State((*state.ids, *ids), ledger, state.edit)
            return span

    def _grow(self, ids: list[int]) -> Span:
        return self.append(ids)

    def _require_tokenizer(self) -> Any:
        return self.tokenizer

    # -- erasing -------------------------------------------------------------------------------------------------

    def erase(self, what: What, *, undo: bool = True) -> VLLMReceipt:
        """Take spans out of the context.

        Args:
            what: a span (as `append` returned it), a message id, a text that occurs once, or several of these.
            undo: keep the erased ids here, for `restore`; without, nothing of them is left in the session, and the
                states it replaces are dropped on the server.

        Raises:
            SpanError: out of range, empty, overlapping an erased span, text not found or found twice.
            EngineError: the server could not do it. In every case the session is as it was.
        """
        with self._lock:
            spans = merge_spans([self.locate(entry) for entry in several(what)], self._state.ledger.length)
            for span in spans:
                self._state.ledger.check_live(span)
            before = self._state
            work = Erasing(self._served(), before)
            try:
                after = work.run(spans)
            except BaseException:
                work.forget()
                raise
            kept = {after.edit, before.edit if undo else None}
            undoable = self._last._before.edit if self._last and self._last._before else None
            work.forget(*{edit.id for edit in (before.edit, undoable) if edit and edit not in kept})
            exact, found = after.edit is None, work.found
            receipt = VLLMReceipt(
                spans,
                exact,
                work.recomputed,
                work.requests,
                after.edit,
                eraser="neutral" if self.eraser == NEUTRAL else "trained",
                recomputed=tuple(
                    part for run in (found.runs if found else ()) for part in before.ledger.from_cache(run)
                ),
                residual=0.0 if exact else found.residual if found else None,
                notes=found.notes if found else (),
                _before=before if undo else None,
                _length=after.ledger.length,
            )
            self._state, self._last = after, receipt
            if not undo:
                self._chat.forget(spans)
            return receipt

    def restore(self, receipt: VLLMReceipt) -> None:
        """Undo the latest erase. What was appended since stays, and is computed again.

        Raises:
            RestoreError: not the latest erase of this session, or made with `undo=False`.
        """
        with self._lock:
            if receipt is not self._last or receipt._before is None:
                raise RestoreError("only the latest erase of a session can be undone, once, unless it said undo=False")
            before, now = receipt._before, self._state
            added = now.ledger.length - receipt._length
            ledger = before.ledger.copy()
            if added:
                ledger.append(added)
            later = now.ids[len(now.ids) - added :] if added else ()
            self._state, self._last = State((*before.ids, *later), ledger, before.edit), None

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The text that is in the context: appended and not erased."""
        return decode(self.tokenizer, [token for run in self._state.ledger.live() for token in self._ids_of(run)])

    def request(self, prompt: str | Sequence[int] = ()) -> dict[str, Any]:
        """What any client of the server has to send for this context, with `prompt` behind it.

        For example `openai_client.completions.create(model=session.model, max_tokens=20, **session.request(question))`.
        """
        with self._lock:
            ids = self._encode(prompt, first=not len(self)) if isinstance(prompt, str) else list(prompt)
            extra: dict[str, Any] = {}
            if edit := self._state.edit:
                extra = {"cache_salt": edit.salt, "kv_transfer_params": Demand(edit=edit.id).params()}
            return {"prompt": [*self._state.ids, *ids], "extra_body": extra}

    def complete(self, prompt: str | Sequence[int] = (), *, max_new_tokens: int = 64, **options: Any) -> Completion:
        """Continue the context, greedily unless told otherwise; the context stays as it is.

        Raises:
            ContextError: an empty context and no prompt.
            EngineError: the server could not do it (an edited context may have been dropped to make room).
        """
        said = self.request(prompt)
        if not said["prompt"]:
            raise ContextError("the context is empty; append something, or give a prompt")
        edit = self._state.edit
        return self._client.complete(
            self.model,
            said["prompt"],
            max_tokens=max_new_tokens,
            demand=Demand(edit=edit.id) if edit else None,
            salt=edit.salt if edit else None,
            **options,
        )

    def generate(
        self, prompt: str | Sequence[int] = (), *, max_new_tokens: int = 64, keep: bool = False, **options: Any
    ) -> str:
        """Continue the context and return the new text.

        Args:
            keep: put prompt and answer behind the context; otherwise it stays as it is.
            options: further fields of the request (temperature, top_p, stop, ...).
        """
        with self._lock:
            done = self.complete(prompt, max_new_tokens=max_new_tokens, **options)
            if keep:
                ids = self._encode(prompt, first=not len(self)) if isinstance(prompt, str) else list(prompt)
                self.append([*ids, *done.ids])
            return done.text

    def chat(self, content: str, *, max_new_tokens: int = 256, keep: bool = True, **options: Any) -> str:
        """Answer a user's message.

        Args:
            keep: put message and answer behind the context; otherwise it stays as it is.
        """
        with self._lock:
            user = self._chat.question(content)
            ids, inside = self._chat.ids_of(self.tokenizer, user)
            opening = self._encode(self._chat.reply_prompt(self.tokenizer, user))
            done = self.complete([*ids, *opening], max_new_tokens=max_new_tokens, **options)
            if keep:
                self._keep_exchange(user, ids, inside, opening, done)
            return done.text

    def close(self) -> None:
        """Drop the session's edited context on the server."""
        with self._lock:
            edits = {
                state.edit.id for state in (self._state, self._last and self._last._before) if state and state.edit
            }
            if edits:
                self._client.complete(self.model, [0], max_tokens=1, demand=Demand(drop=tuple(edits)))
            self._state, self._last = State((), SpanLedger(), None), None
            self._chat = Conversation()

    # -- inside --------------------------------------------------------------------------------------------------

    def _served(self) -> Served:
        return Served(
            self._client,
            self.model,
            None if self.eraser == NEUTRAL else self.eraser,
            self.window,
            self.repair,
            len(self.tokenizer),
            self._special,
            self.choose,
            (self.block if self.repair is None else min(self.block, self.repair)) or None,
            self.coverage,
            self.close_gaps,
        )

    def _about(self) -> dict[str, Any] | None:
        """How the server is set up; None without our connector.

        Raises:
            EngineError: it says something else there than is read.
        """
        found = self._client.complete(self.model, [0], max_tokens=1, demand=Demand(about=True)).said.get("about")
        with reading("the server"):
            return None if found is None else dict(found)

    def _encode(self, text: str, first: bool = False) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=first))

    def _find(self, text: str) -> Span:
        return find_text(self.tokenizer, [(run, self._ids_of(run)) for run in self._state.ledger.live()], text)

    def _ids_of(self, run: Span) -> list[int]:
        return list(self._state.ids[self._state.ledger.span_to_cache(run).slice])

    def _keep_exchange(self, user: Message, ids: list[int], inside: Span, opening: list[int], done: Completion) -> None:
        ended = bool(done.ids) and done.ids[-1] in self._special
        closing = self._chat.closing(self.tokenizer, done.text, done.ids, user, ended=ended)
        asked = self.append([*ids, *opening])
        self._chat.enter(user, inside.shift(asked.start))
        if not done.text.strip():
            return
        self._chat.enter_reply(done.text, len(self), len(done.ids), ended=ended)
        self.append(done.ids)
        if closing:
            self.append(self._encode(closing))


def _load_tokenizer(served: dict[str, Any]) -> PreTrainedTokenizerBase:
    place = served.get("root") or served["id"]
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"the server's model is at {place!r}, and no tokenizer can be loaded from there; give one with tokenizer="
        ) from error
    return tokenizer
