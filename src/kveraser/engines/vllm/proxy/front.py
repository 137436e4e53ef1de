"""A chat completion from its request to its reply, and every other request that is passed on.

Knows: how the parts work together, and when an edit is worth it. Does not know about routes or keys.

For a chat completion: a server renders it (so that the ids are the very ones that it would read), the conversation that it goes on with
is found by these ids, and what it leaves out is erased on the server that has it. Whatever goes wrong on the way ends in the request
being passed on as it came: the answer is then that of a plain vLLM, and as exact.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from fastapi import Request
from transformers import PreTrainedTokenizerBase

from kveraser.engines.vllm.protocol import reading
from kveraser.engines.vllm.proxy.asked import Asked, read_body, read_chat
from kveraser.engines.vllm.proxy.comparing import Ids, Use
from kveraser.engines.vllm.proxy.conversations import Conversation, Conversations, Owner, fresh_view
from kveraser.engines.vllm.proxy.editing import Edited, Sessions
from kveraser.engines.vllm.proxy.metrics import ProxyMetrics
from kveraser.engines.vllm.proxy.passing import Attempt, Opened, Passed, open_first
from kveraser.engines.vllm.proxy.refreshing import Refresher
from kveraser.engines.vllm.proxy.replicas import Replica, Replicas
from kveraser.engines.vllm.proxy.replies import EditReport, Told
from kveraser.errors import EngineError, KVEraserError, OptionError
from kveraser.readers import LEAST_READERS
from kveraser.serving.contexts.reuse import Policy
from kveraser.serving.contexts.view import View
from kveraser.serving.waiting import first_of

log = logging.getLogger("kveraser")

_CHAT = "/v1/chat/completions"
_ERASE_SECONDS = 120.0  # for one request of an erase; then the request is passed on
_LEARN_AFTER, _LEARN_EVERY = (
    0.5,
    30.0,
)  # seconds to the second try to learn what a server can do, and between later ones


@dataclass(frozen=True)
class ProxyOptions:
    """How to pass requests on.

    Attributes:
        policy: for requests that name none.
        readers: as for `VLLMSession.repair`, where no trained eraser has a number of its own; None: by the length of what is erased.
        upstream_key: what the servers want as API key.
        conversations, tokens: how many of each are remembered at most.
        min_saved: tokens that an edit has to save over reading what vLLM's prefix cache has not.
        timeout: seconds without a byte of a reply after which a server has failed.
    """

    policy: Policy = "kveraser"
    readers: int | None = LEAST_READERS
    upstream_key: str | None = None
    conversations: int = 1024
    tokens: int = 8 << 20
    min_saved: int = 256
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("conversations", "tokens", "timeout"):
            if getattr(self, name) <= 0:
                raise OptionError(f"{name}={getattr(self, name)} must be more than 0")
        if self.readers is not None and self.readers < 0:
            raise OptionError(f"readers={self.readers} must be at least 0 tokens")
        if self.min_saved < 0:
            raise OptionError(f"min_saved={self.min_saved} must be at least 0 tokens")


@dataclass
class _Plan:
    """What is to be done with a request.

    Attributes:
        first: the server that is asked first; None leaves that to how busy they are.
        known: the conversation that it goes on with.
        wanted: its ids; None where it is not followed.
        edited: the body for an edited context.
        seen: the conversation's view when the plan was made: another one means that it has gone on without this request.
    """

    asked: Asked
    policy: Policy
    owner: Owner
    wanted: Ids | None = None
    first: Replica | None = None
    known: Conversation | None = None
    edited: tuple[bytes, Told] | None = None
    seen: View | None = field(default=None, repr=False)


class Front:
    """Everything behind the routes.

    Args:
        urls: of the servers.
        tokenizer: the model's; None has it loaded from where the first server says the model is.
    """

    def __init__(
        self, urls: Sequence[str], options: ProxyOptions, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.options = options
        self.replicas = Replicas(urls, key=options.upstream_key, timeout=options.timeout)
        self.sessions = Sessions(options.upstream_key, min(options.timeout, _ERASE_SECONDS), tokenizer, options.readers)
        self.conversations = Conversations(options.conversations, options.tokens, self._forget)
        self.metrics = ProxyMetrics(self.conversations, self.replicas)
        self.refresher = Refresher(self.conversations, self.sessions, self.replicas, self.metrics.refreshed.inc)
        self._learning: list[asyncio.Task[None]] = []

    # -- starting and stopping ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to learn what the servers can do, until each has told."""
        self._learning = [asyncio.create_task(self._learn(replica)) for replica in self.replicas.all]

    async def _learn(self, replica: Replica) -> None:
        told, wait = "", _LEARN_AFTER
        while True:
            try:
                said = await self.replicas.json(replica, "/v1/models")
                with reading(f"{replica.url}/v1/models"):
                    cards = said["data"]
                    models = [str(card["id"]) for card in cards if not card.get("parent")]
                    most = min((card["max_model_len"] for card in cards if card.get("max_model_len")), default=0)
                for name in models:
                    await self.sessions.run(partial(self._try, replica.url, name))
                replica.models = frozenset(models)
                replica.max_tokens = most
                replica.down_until = 0.0
                return
            except KVEraserError as error:
                if told != str(error):
                    told = str(error)
                    log.warning("server %d: nothing is edited there yet: %s", replica.number, told)
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LEARN_EVERY)

    def _try(self, url: str, model: str) -> None:
        self.sessions.close(self.sessions.open(url, model))

    async def stop(self) -> None:
        """Drop the edited contexts on the servers, as far as they answer, and close all connections."""
        for task in self._learning:
            task.cancel()
        await self.refresher.stop()
        self.conversations.stop()
        for entry in list(self.conversations):
            self.conversations.remove(entry)
            self._forget(entry)
        await asyncio.get_running_loop().run_in_executor(None, self.sessions.stop)
        await self.replicas.close()

    def _forget(self, entry: Conversation) -> None:
        if entry.session is not None:
            self.sessions.dispose(entry.session, tell=self.replicas.all[entry.replica].is_up)
            entry.session = None

    # -- requests ----------------------------------------------------------------------------------------------------

    async def pass_on(self, request: Request) -> Passed:
        """Have a request answered as it is.

        Raises:
            ApiError: it asks for what cannot be behind a proxy; no server can be reached.
        """
        raw = await request.body()
        read_body(raw)
        path = request.scope["raw_path"].decode("ascii") + (f"?{request.url.query}" if request.url.query else "")
        attempts = [Attempt(replica, raw) for replica in self.replicas.order()]
        return Passed(await self._open(request, path, attempts), lambda: None)

    async def chat(self, request: Request, owner: str) -> Passed:
        """Answer a chat completion.

        Raises:
            ApiError: it asks for what cannot be behind a proxy; no server can be reached.
        """
        asked = read_chat(await request.body())
        plan = _Plan(asked, asked.policy or self.options.policy, (owner, asked.model))
        known: Conversation | None = None
        try:
            if asked.follows:
                await self._make(plan)
            known = plan.known if plan.edited else None
            attempts = [Attempt(replica, asked.raw) for replica in self.replicas.order(plan.first)]
            if plan.edited and plan.first is not None:
                attempts.insert(0, Attempt(plan.first, *plan.edited))
            opened = await self._open(request, _CHAT, attempts)
        except BaseException:
            _free(known)
            raise
        if opened.attempt.told is None:
            _free(known)
            known = None
        entry = self._enter(plan, opened) if opened.is_reply else None

        def done() -> None:
            _free(known)
            if entry is not None and entry.session is not None and plan.policy == "auto":
                self.refresher.ask(entry)

        return Passed(opened, done)

    async def _open(self, request: Request, path: str, attempts: Sequence[Attempt]) -> Opened:
        begun: list[Opened] = []

        async def opening() -> AsyncGenerator[Opened]:
            begun.append(await open_first(
                self.replicas, attempts, request.method, path, request.headers,
                lambda attempt: self.metrics.failures.labels(str(attempt.replica.number)).inc(),
            ))  # fmt: skip
            yield begun[0]

        events = opening()
        try:
            return await first_of(request, events)
        except BaseException:
            for opened in begun:  # the client has gone at that moment
                await opened.close()
            raise
        finally:
            await events.aclose()

    # -- planning ----------------------------------------------------------------------------------------------------

    async def _make(self, plan: _Plan) -> None:
        """Find out what a chat completion goes on with, and edit that where it is worth it."""
        ids = await self._render(plan.asked)
        if ids is None:
            return
        plan.wanted = np.asarray(ids, dtype=np.int64)
        found = await self.conversations.find(
            plan.owner, plan.wanted, edit=plan.policy != "exact", starts=self.sessions.starts
        )
        if found is None:
            return
        known, use = found
        self.refresher.settle(known)
        replica = self.replicas.all[known.replica]
        if 2 * use.new_from >= len(plan.wanted):
            plan.first = replica
        if known.goes_on(use, self.sessions.starts):
            plan.known, plan.seen = known, known.view
            if plan.policy != "exact" and self._is_worth(plan, known, use, replica):
                await self._edit(plan, known, use, replica)

    async def _render(self, asked: Asked) -> list[int] | None:
        """The ids of a chat completion, by a server; None where it cannot be followed (the server will say what is wrong)."""
        body = {**asked.body, "stream": False, "stream_options": None}
        for replica in [each for each in self.replicas.order() if each.is_up]:
            try:
                made = await self.replicas.json(replica, f"{_CHAT}/render", body)
                with reading(f"{replica.url}{_CHAT}/render"):
                    return None if made.get("features") else list(made["token_ids"])
            except EngineError as error:
                if replica.is_up:
                    log.debug("not followed: %s", error)
                    return None
                continue
        return None

    def _is_worth(self, plan: _Plan, known: Conversation, use: Use, replica: Replica) -> bool:
        """Whether an edited context can answer, and saves enough."""
        assert plan.wanted is not None
        cut = len(known.view) - use.kept_until
        if not replica.is_up or plan.asked.model not in replica.models or not (use.removals or known.session):
            return False
        if known.changing or (known.session is not None and known.busy and (use.removals or cut)):
            return False  # what others are being answered from stays as it is
        held = len(known.view if known.session is None else known.session) - cut
        if held + len(plan.wanted) - use.new_from + plan.asked.max_tokens > replica.max_tokens:
            return False  # erased tokens keep their places
        readers = use.readers if self.options.readers is None else 0
        return use.gain - readers - (0 if known.session else use.prefix) >= self.options.min_saved

    async def _edit(self, plan: _Plan, known: Conversation, use: Use, replica: Replica) -> None:
        """Have a server erase what a request leaves out, and make the body for the edited context."""
        assert plan.wanted is not None
        started = time.perf_counter()
        session, view = known.session, known.view
        known.busy += 1
        known.changing = session is not None
        try:
            if session is None:
                edited = await self.sessions.run(lambda: self.sessions.edit(replica.url, plan.asked.model, view, use))
            elif use.removals or use.kept_until < len(view):
                edited = await self.sessions.run(lambda: self.sessions.edit_more(session, view, use))
            else:
                edited = Edited(session, view, None)
        except KVEraserError as error:
            log.warning(
                "server %d: erasing failed (%s); the request is passed on", replica.number, type(error).__name__
            )
            self.metrics.erases.labels("failed").inc()
            return
        finally:
            known.busy -= 1
            known.changing = False
        seconds = time.perf_counter() - started
        if edited.receipt is not None:
            self.metrics.erases.labels("done").inc()
            self.metrics.erase_seconds.observe(seconds)
        self._take_over(plan, known, edited)
        said = self.sessions.prompt(edited.session, plan.wanted[len(edited.view) :])
        if said is None:
            return
        report = self._report(plan.wanted, edited, use, seconds)
        assert plan.known is not None
        plan.known.busy += 1
        plan.first = replica
        plan.edited = plan.asked.with_prompt(*said), Told(report, len(plan.wanted))

    def _take_over(self, plan: _Plan, known: Conversation, edited: Edited) -> None:
        """Make an edited context the conversation's, or that of a branch of it where it has gone on meanwhile."""
        if known.session is edited.session:
            known.view = edited.view
            plan.known = known
        else:
            plan.known = Conversation(known.owner, edited.view, known.replica, edited.session)
            if plan.seen is known.view and not known.busy and known.session is None:
                self.conversations.remove(known)
        self.conversations.put(plan.known)
        plan.seen = plan.known.view

    @staticmethod
    def _report(wanted: Ids, edited: Edited, use: Use, seconds: float) -> EditReport:
        receipt = edited.receipt
        new = len(wanted) - len(edited.view)
        return EditReport(
            method="kveraser" if receipt else "prefix",
            exact=False,
            spans=use.removals,
            tokens_reused=len(edited.view),
            tokens_recomputed=new + (receipt.tokens_recomputed if receipt else 0),
            erase_seconds=round(seconds, 4) if receipt else 0.0,
        )

    # -- what is remembered afterwards ---------------------------------------------------------------------------------

    def _enter(self, plan: _Plan, opened: Opened) -> Conversation | None:
        """Remember what a server has read now; the conversation, where it is followed."""
        told = opened.attempt.told
        self.metrics.replies.labels(told.report.method if told else "passed").inc()
        wanted, known = plan.wanted, plan.known
        if wanted is None:
            return None
        mine = known is not None and known.view is plan.seen
        if told:
            assert known is not None and known.session is not None
            if mine:  # else another request has gone on with it meanwhile, and this one was a branch
                known.view = self.sessions.go_on(known.session, known.view, wanted)
                self.conversations.put(known)
            return known
        if known is None or not mine or (known.busy and known.session):
            known = Conversation(plan.owner, fresh_view(wanted), opened.attempt.replica.number)
        self._forget(known)  # it was answered without the edited context, if there was one
        known.view, known.prefilled, known.replica = fresh_view(wanted), None, opened.attempt.replica.number
        self.conversations.put(known)
        return known


def _free(entry: Conversation | None) -> None:
    if entry is not None:
        entry.busy -= 1
