"""The scheduler's side of the connector: admits requests, gives out ids, and seals what the workers have written.

Knows: requests, demands, the store. Does not know how states are moved into blocks and out of them (`worker.py`).
"""

from __future__ import annotations

import secrets
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from kveraser.engines.vllm.protocol import KEY, Demand, Found, Piece, read_demand
from kveraser.engines.vllm.server.entries import Entry, digest_ids
from kveraser.engines.vllm.server.looking import Looking
from kveraser.engines.vllm.server.step import Keep, Load, Observe, Step
from kveraser.engines.vllm.server.store import EditStore
from kveraser.errors import EngineError, KVEraserError

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kveraser")

_PATIENCE = 0.02
"""Seconds that a step in which nothing else is to be done waits for a look, so that an engine without other work does not spin."""


@dataclass
class _Admitted:
    """What the scheduler knows of a request that asked for something.

    Attributes:
        pieces: what is loaded into its first positions.
        saves: entry ids of what it saves, in the order of the demand.
        queries: those of the queries of the same positions.
        written: whether the workers were told to save.
        composed: the edited context it makes.
        looking: the look at stored states that it waits for.
        refused: why it must fail.
        answer: for the response.
    """

    demand: Demand
    pieces: tuple[Piece, ...] = ()
    saves: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    written: bool = False
    composed: Entry | None = None
    looking: Future[Found | None] | None = None
    refused: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def loads(self) -> int:
        """Positions that are loaded."""
        return sum(len(piece) for piece in self.pieces)


class SchedulerSide:
    """What the connector does in the process that admits requests; vLLM's own names.

    Args:
        store: of this engine.
        about: what a session is told that asks about the server.
        looking: tells who has read a span; None: nobody does.
    """

    def __init__(self, store: EditStore, about: dict[str, Any], looking: Looking | None = None) -> None:
        self._store, self._about, self._looking = store, about, looking
        self._beside = ThreadPoolExecutor(1, "kveraser-looking")
        self._admitted: dict[str, _Admitted] = {}
        self._to_load: dict[str, tuple[int, int]] = {}
        store.clean()

    # -- admitting ----------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Admit a request, or refuse it if it asks for what cannot be."""
        salt = None
        try:
            demand = read_demand(request.kv_transfer_params)
            if demand is None:
                return
            admitted, salt = self._admit(request, demand)
        except Exception as error:  # an error here would end the engine; this one request is refused instead
            logger.warning("kveraser: request %s is refused: %r", request.request_id, error)
            admitted = _Admitted(Demand(), refused=str(error), answer={"error": str(error)})
        self._admitted[request.request_id] = admitted
        if admitted.refused is not None or admitted.pieces:
            request.skip_reading_prefix_cache = False  # else vLLM would not ask us for the states
            _isolate(request, salt or secrets.token_hex(16))

    def _admit(self, request: Request, demand: Demand) -> tuple[_Admitted, str | None]:
        """Check a demand and look up what it loads; also the salt to put the request under (None: a random one)."""
        ids = request.prompt_token_ids
        if ids is None or request.skip_reading_prefix_cache:
            raise EngineError("a request of this kind needs token ids, and gives no logprobs of its prompt")
        if any(save.end > len(ids) for save in demand.save):
            raise EngineError(f"the prompt has {len(ids)} tokens, states of {demand.save[-1].end} are to be saved")
        admitted, salt = _Admitted(demand), None
        looking = self._looking
        if looking is None and (demand.look or demand.learn or demand.observe):
            raise EngineError("this server was started without an eraser, or its model's readers cannot be told")
        if looking is not None and (demand.look or demand.learn):
            admitted.looking = self._beside.submit(self._look, looking, demand)
        else:
            self._drop(demand)
        if demand.about:
            admitted.answer["about"] = self._about
        if demand.edit:
            edit = self._store.entry(demand.edit)
            if edit.ids is None:
                raise EngineError(f"entry {edit.id} is no edited context")
            if len(ids) < edit.tokens or digest_ids(ids[: edit.tokens]) != edit.ids:
                raise EngineError(
                    f"the prompt does not begin with the {edit.tokens} ids that edit {edit.id} was made for"
                )
            if request.lora_request is not None:
                raise EngineError(f"edit {edit.id} is served by the model itself, not with an adapter")
            admitted.pieces, salt = edit.pieces, edit.salt
        elif demand.load or demand.compose:
            admitted.pieces = demand.load or demand.compose
            if admitted.loads > len(ids):
                raise EngineError(f"{admitted.loads} states are to be loaded into a prompt of {len(ids)} tokens")
            for piece in admitted.pieces:
                if piece.end > self._store.entry(piece.entry).tokens:
                    raise EngineError(f"entry {piece.entry} has no states [{piece.start}, {piece.end})")
            if demand.under:
                salt = f"under {demand.under}"
        if demand.save or demand.compose:
            size = sum(len(save) for save in demand.save) * self._store.geometry.bytes_per_token
            if demand.observe and looking is not None:
                if len(demand.save) != 1 or demand.save[0].start:
                    raise EngineError("queries are kept of the beginning of a prompt")
                admitted.queries = tuple(self._store.new_id() for _ in range(looking.of_queries))
                size *= 1 + len(admitted.queries)
                self._about["learns"] = False  # it is tried once
                _isolate(request, secrets.token_hex(16))  # every token of it has to be computed
            self._store.make_room(size, keep=[piece.entry for piece in admitted.pieces], client=demand.client)
        if demand.compose:
            edit = self._store.compose(demand.compose, digest_ids(ids[: admitted.loads]), demand.client)
            admitted.composed, salt = edit, edit.salt
            admitted.answer["edit"] = {"id": edit.id, "tokens": edit.tokens, "salt": edit.salt}
        admitted.saves = tuple(self._store.new_id() for _ in demand.save)
        return admitted, salt

    def _look(self, looking: Looking, demand: Demand) -> Found | None:
        """In the thread beside; what is dropped is dropped whatever comes of it."""
        try:
            if demand.learn is not None:
                self._about |= looking.learn(demand.learn)
            return None if demand.look is None else looking.look(demand.look, demand.client)
        finally:
            self._drop(demand)

    def _drop(self, demand: Demand) -> None:
        for entry in demand.drop:
            self._store.drop(entry)

    # -- every step ---------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many positions behind the computed ones will be loaded, never later than now; None: ask again in the next step."""
        admitted = self._admitted.get(request.request_id)
        if admitted is None:
            return 0, False
        if admitted.looking is not None and not admitted.looking.done():
            return None, False
        last = request.num_tokens - 1  # the last token always runs: its logits are wanted
        wanted = min(admitted.loads, last) if admitted.refused is None else last
        return max(wanted - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Blocks were given to the positions that are loaded."""
        admitted = self._admitted.get(request.request_id)
        if admitted is not None and num_external_tokens:
            last = request.num_tokens - 1
            end = min(admitted.loads, last) if admitted.refused is None else last
            self._to_load[request.request_id] = (end - num_external_tokens, end)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Step:
        """What the workers have to do in the next step."""
        step = Step()
        if not scheduler_output.num_scheduled_tokens:
            looks = [each.looking for each in self._admitted.values() if each.looking is not None]
            wait(looks, _PATIENCE, FIRST_COMPLETED)
        state = scheduler_output.kv_connector_block_state

        def blocks(request: str) -> tuple[int, ...]:
            return tuple(state.resolve_block_ids(request)[0])

        for request, (start, end) in self._to_load.items():
            admitted = self._admitted[request]
            step.loads.append(Load(request, admitted.pieces, blocks(request), start, end, admitted.refused))
        self._to_load.clear()
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts.update((new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs)
        for request, start in starts.items():
            asked = self._admitted.get(request)
            if asked is None or not asked.saves or asked.written:
                continue
            saves = asked.demand.save
            if asked.queries:
                step.observes.append(Observe(request, asked.queries, blocks(request), len(saves[0])))
            if start + scheduler_output.num_scheduled_tokens[request] >= max(save.end for save in saves):
                step.keeps.append(Keep(tuple(zip(asked.saves, saves, strict=True)), blocks(request)))
                asked.written = True
        return step

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Seal or drop what a request was to leave behind; what to answer it."""
        admitted = self._admitted.pop(request.request_id, None)
        self._to_load.pop(request.request_id, None)
        if admitted is None:
            return False, None
        self._answer_look(admitted)
        finished = request.get_finished_reason()
        done = admitted.refused is None and finished is not None and str(finished) in ("stop", "length")
        answer = admitted.answer
        if admitted.composed and not done:
            self._store.drop(admitted.composed.id)
        sealed: list[str] = []
        try:
            of_queries = zip(admitted.queries, admitted.demand.save * len(admitted.queries), strict=True)
            for entry, save in (*zip(admitted.saves, admitted.demand.save, strict=True), *of_queries):
                if not (done and admitted.written):
                    self._store.discard(entry)
                else:
                    sealed.append(self._store.seal(entry, len(save), admitted.demand.client).id)
        except (KVEraserError, OSError) as error:
            logger.error("kveraser: states of request %s were not kept: %s", request.request_id, error)
            for entry in sealed:
                self._store.drop(entry)
            answer = {"error": str(error)}
        if sealed and "error" not in answer:
            answer["saved"] = sealed
        return False, {KEY: answer}

    def _answer_look(self, admitted: _Admitted) -> None:
        looking = admitted.looking
        if looking is None:
            return
        if not looking.done():  # nobody waits for it any more
            looking.add_done_callback(self._forget_hidden)
            looking.cancel()
        elif error := looking.exception():
            logger.warning("kveraser: readers could not be told: %r", error)
            admitted.answer["error"] = str(error)
        elif found := looking.result():
            admitted.answer["found"] = found.said()

    def _forget_hidden(self, looking: Future[Found | None]) -> None:
        if not looking.cancelled() and looking.exception() is None and (found := looking.result()):
            for entry in found.hidden:
                self._store.drop(entry)


def _isolate(request: Request, salt: str) -> None:
    """Put a request under a salt of its own, so that it finds no block of another in the prefix cache."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
