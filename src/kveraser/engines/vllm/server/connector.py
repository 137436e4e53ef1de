"""A KV connector for vLLM that keeps states of requests and serves edited contexts made of them.

Knows: vLLM's connector interface (v1). Does not know about text, or why states are kept or exchanged.

Loaded by vLLM itself, without a patch: `--kv-transfer-config` with `kv_connector_module_path="kveraser.engines.vllm.server.connector"`
and `kv_connector="EraserConnector"` (`launch.py` writes it). Half of it lives in the scheduler, which admits requests,
gives out ids and seals entries; the other half in every worker, which moves states between the store and its blocks.

Erased text must not come back by way of the prefix cache. Three things see to it:
- A request for an edited context is put under that edit's own secret salt, whatever salt it came with, so that it shares
  no block with any other request.
- It must begin with the very ids the edit was made for, in which the erased ids were replaced by random ones. Otherwise
  it fails.
- Whatever cannot be loaded makes the request fail (`kv_load_failure_policy="fail"`); nothing is computed in its place.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kveraser.engines.vllm.protocol import KEY, Demand, Piece, Save, read_demand
from kveraser.engines.vllm.server.layout import WorkerCache
from kveraser.engines.vllm.server.store import EditStore, Entry, Geometry, digest_ids
from kveraser.eraser.config import FILE_NAME, EraserConfig
from kveraser.errors import EngineError, EraserMismatchError, KVEraserError, OptionError, UnsupportedCacheError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger("vllm.kveraser")

DEFAULT_CAPACITY_GB = 8.0
_SHAPE_KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "vocab_size")  # fmt: skip
_CONTEXT_PARALLEL = ("decode_context_parallel_size", "prefill_context_parallel_size")


@dataclass
class _Admitted:
    """What the scheduler knows of a request that asked for something.

    Attributes:
        pieces: what is loaded into its first positions.
        saves: entry ids of what it saves, in the order of the demand.
        written: whether the workers were told to save.
        composed: the edited context it makes.
        refused: why it must fail.
        answer: for the response.
    """

    demand: Demand
    pieces: tuple[Piece, ...] = ()
    saves: tuple[str, ...] = ()
    written: bool = False
    composed: Entry | None = None
    refused: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def loads(self) -> int:
        """Positions that are loaded."""
        return sum(len(piece) for piece in self.pieces)


@dataclass(frozen=True)
class _Load:
    """For the workers: fill positions `[start, end)` of a request's blocks."""

    request: str
    pieces: tuple[Piece, ...]
    blocks: tuple[int, ...]
    start: int
    end: int
    refused: str | None


@dataclass(frozen=True)
class _Keep:
    """For the workers: write the states of some positions into new entries."""

    saves: tuple[tuple[str, Save], ...]
    blocks: tuple[int, ...]


@dataclass
class _Step(KVConnectorMetadata):
    loads: list[_Load] = field(default_factory=list)
    keeps: list[_Keep] = field(default_factory=list)


class EraserConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps states and serves edited contexts.

    `kv_connector_extra_config`: `store` (folder, required), `capacity_gb`, `eraser` (its PEFT folder: tells sessions its
    window and repair).

    Raises:
        UnsupportedCacheError: a model or cache whose states cannot be exchanged.
        OptionError: a configuration that would not fail closed, or lacks the store.
        EraserMismatchError: an eraser of a model of another shape.
        StoreError: the folder cannot be used.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block_size = _check_cache(vllm_config, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "fail":
            raise OptionError(
                f'kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: it must be "fail", since computing what '
                "could not be loaded would bring back what was erased"
            )
        _check_adapters(vllm_config)
        options = transfer.kv_connector_extra_config or {}
        if not options.get("store"):
            raise OptionError(
                'kv_connector_extra_config needs "store": a folder that all processes of the engine share'
            )
        self._geometry = _geometry(vllm_config)
        capacity = int(float(options.get("capacity_gb", DEFAULT_CAPACITY_GB)) * 2**30)
        self._store = EditStore(options["store"], capacity, self._geometry)
        self._about = _about(vllm_config, options.get("eraser"))
        self._admitted: dict[str, _Admitted] = {}
        self._to_load: dict[str, tuple[int, int]] = {}
        self._cache: WorkerCache | None = None
        self._failed_blocks: set[int] = set()
        if role == KVConnectorRole.SCHEDULER:
            self._store.clean()

    # -- scheduler: admitting ------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
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
        for entry in demand.drop:
            self._store.drop(entry)
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
            admitted.pieces, salt = (Piece(edit.id, 0, edit.tokens),), edit.salt
        elif demand.load or demand.compose:
            admitted.pieces = demand.load or demand.compose
            if admitted.loads > len(ids):
                raise EngineError(f"{admitted.loads} states are to be loaded into a prompt of {len(ids)} tokens")
            for piece in admitted.pieces:
                if piece.end > self._store.entry(piece.entry).tokens:
                    raise EngineError(f"entry {piece.entry} has no states [{piece.start}, {piece.end})")
        if demand.save or demand.compose:
            size = sum(len(save) for save in demand.save) * self._geometry.bytes_per_token
            self._store.make_room(size, keep=[piece.entry for piece in admitted.pieces], client=demand.client)
        if demand.compose:
            edit = self._store.compose(demand.compose, digest_ids(ids[: admitted.loads]), demand.client)
            admitted.composed, salt = edit, edit.salt
            admitted.answer["edit"] = {"id": edit.id, "tokens": edit.tokens, "salt": edit.salt}
        admitted.saves = tuple(self._store.new_id() for _ in demand.save)
        return admitted, salt

    # -- scheduler: every step -----------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        admitted = self._admitted.get(request.request_id)
        if admitted is None:
            return 0, False
        last = request.num_tokens - 1  # the last token always runs: its logits are wanted
        wanted = min(admitted.loads, last) if admitted.refused is None else last
        return max(wanted - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        admitted = self._admitted.get(request.request_id)
        if admitted is not None and num_external_tokens:
            last = request.num_tokens - 1
            end = min(admitted.loads, last) if admitted.refused is None else last
            self._to_load[request.request_id] = (end - num_external_tokens, end)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        step = _Step()
        state = scheduler_output.kv_connector_block_state

        def blocks(request: str) -> tuple[int, ...]:
            return tuple(state.resolve_block_ids(request)[0])

        for request, (start, end) in self._to_load.items():
            admitted = self._admitted[request]
            step.loads.append(_Load(request, admitted.pieces, blocks(request), start, end, admitted.refused))
        self._to_load.clear()
        cached = scheduler_output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts.update((new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs)
        for request, start in starts.items():
            asked = self._admitted.get(request)
            if asked is None or not asked.saves or asked.written:
                continue
            saves = asked.demand.save
            if start + scheduler_output.num_scheduled_tokens[request] >= max(save.end for save in saves):
                step.keeps.append(_Keep(tuple(zip(asked.saves, saves, strict=True)), blocks(request)))
                asked.written = True
        return step

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        admitted = self._admitted.pop(request.request_id, None)
        self._to_load.pop(request.request_id, None)
        if admitted is None:
            return False, None
        finished = request.get_finished_reason()
        done = admitted.refused is None and finished is not None and str(finished) in ("stop", "length")
        answer = admitted.answer
        if admitted.composed and not done:
            self._store.drop(admitted.composed.id)
        sealed: list[str] = []
        try:
            for entry, save in zip(admitted.saves, admitted.demand.save, strict=True):
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

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # -- workers -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = self._vllm_config.compilation_config.static_forward_context
        config = self._vllm_config.model_config.hf_text_config
        rotary = getattr(config, "no_rope_layers", None) or [True] * self._geometry.layers
        self._cache = WorkerCache(
            {name: layers[name] for name in kv_caches},
            self._block_size,
            self._geometry.kv_heads,
            [bool(entry) for entry in rotary],
        )

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, _Step)
        for job in step.loads:
            try:
                if job.refused is not None:
                    raise EngineError(job.refused)
                self._fill(job)
            except Exception as error:  # whatever went wrong, this one request fails and the engine goes on
                if not isinstance(error, KVEraserError):
                    logger.exception("kveraser: loading for request %s failed", job.request)
                else:
                    logger.error("kveraser: request %s fails: %s", job.request, error)
                first, last = job.start // self._block_size, -(-job.end // self._block_size)
                self._failed_blocks.update(job.blocks[first:last])

    def _fill(self, job: _Load) -> None:
        assert self._cache is not None
        parts = []
        at = 0
        for piece in job.pieces:
            low, high = max(job.start - at, 0), min(job.end - at, len(piece))
            if low < high:
                entry = self._store.entry(piece.entry)
                chosen = piece.cut(low, high)
                keys, values = self._store.read(entry, chosen.start, chosen.end, self._cache.layers, self._cache.heads)
                parts.append((self._cache.moved(keys, piece.move), values))
            at += len(piece)
        keys = torch.cat([part[0] for part in parts], 1)
        values = torch.cat([part[1] for part in parts], 1)
        if keys.shape[1] != job.end - job.start:
            raise EngineError(f"{keys.shape[1]} states were found for positions [{job.start}, {job.end})")
        self._cache.write(job.blocks, job.start, keys, values)

    def wait_for_save(self) -> None:
        step = self._get_connector_metadata()
        assert isinstance(step, _Step)
        for job in step.keeps:
            for entry, save in job.saves:
                try:
                    self._keep(entry, save, job.blocks)
                except Exception:  # the entry stays incomplete, so the scheduler will not seal it
                    logger.exception("kveraser: states could not be kept")

    def _keep(self, entry: str, save: Save, blocks: tuple[int, ...]) -> None:
        assert self._cache is not None
        if self._cache.writes:
            keys, values = self._cache.read(blocks, save.start, save.end)
            moved = self._cache.moved(keys, save.move)
            self._store.write(entry, self._cache.layers.start, self._cache.heads.start, moved, values)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return


def _isolate(request: Request, salt: str) -> None:
    """Put a request under a salt of its own, so that it finds no block of another in the prefix cache."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()


def _check_cache(config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """The block size of a cache whose states can be exchanged.

    Raises:
        UnsupportedCacheError: any other cache.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    problem = None
    if len(specs) != 1 or type(specs[0]) is not FullAttentionSpec:
        problem = f"its layers use {', '.join(type(spec).__name__ for spec in specs)}, one group of FullAttentionSpec is needed"
    elif specs[0].sliding_window or specs[0].attention_chunk_size:
        problem = "some layers attend to a sliding window or to chunks"
    elif config.cache_config.cache_dtype not in ("auto", str(config.model_config.dtype).removeprefix("torch.")):
        problem = f"its KV cache is quantised ({config.cache_config.cache_dtype})"
    elif config.speculative_config is not None:
        problem = "a draft model has states of its own"
    elif any(getattr(config.parallel_config, name, 1) > 1 for name in _CONTEXT_PARALLEL):
        problem = "the context is split over processes (context parallel)"
    if problem:
        raise UnsupportedCacheError(f"states of {config.model_config.model} cannot be exchanged: {problem}")
    return int(specs[0].block_size)


def _check_adapters(config: VllmConfig) -> None:
    """Refuse a CPU server without an empty adapter slot.

    In a batch of requests with and without adapter, vLLM's CPU operations look up "no adapter" as slot -1, which is the
    last one. Unless that one is empty, plain requests are answered with it.
    """
    lora = config.lora_config
    if lora is not None and lora.max_loras < 2 and current_platform.is_cpu():
        raise OptionError(
            f"max_loras is {lora.max_loras}: on a CPU vLLM applies the last adapter slot to requests without one; start "
            "it with --max-loras 2 (one more than there are adapters), so that this slot is empty"
        )


def _geometry(config: VllmConfig) -> Geometry:
    model = config.model_config
    shape = {key: getattr(model.hf_text_config, key, None) for key in _SHAPE_KEYS}
    # The rotary configuration is part of it: keys rotated otherwise look the same and are wrong.
    shape["rope"] = str(getattr(model.hf_text_config, "rope_parameters", None))
    known = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Geometry(
        model=f"{Path(str(model.model)).name}-{known}",
        dtype=str(model.dtype).removeprefix("torch."),
        layers=int(model.hf_text_config.num_hidden_layers),
        kv_heads=int(model.get_total_num_kv_heads()),
        head_dim=int(model.get_head_size()),
    )


def _about(config: VllmConfig, eraser: str | None) -> dict[str, Any]:
    """What a session has to know: the eraser's window and repair (checked against the model's shape)."""
    about: dict[str, Any] = {"max_tokens": config.model_config.max_model_len, "window": None, "repair": 0}
    if eraser is None:
        return about
    settings = EraserConfig.read(Path(eraser) / FILE_NAME)
    for key, value in settings.fingerprint.shape.items():
        mine = getattr(config.model_config.hf_text_config, key, None)
        if mine != value:
            raise EraserMismatchError(
                f"the eraser in {eraser} was made for a model with {key} {value}, this one has {mine}"
            )
    about.update(window=settings.window and list(settings.window), repair=settings.repair_next)
    return about
