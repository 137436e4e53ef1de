"""A KV connector for vLLM that keeps states of requests and serves edited contexts made of them.

Knows: vLLM's connector interface (v1). Does not know about text, or why states are kept or exchanged.

Loaded by vLLM itself, without a patch: `--kv-transfer-config` with `kv_connector_module_path="kveraser.engines.vllm.server.connector"`
and `kv_connector="EraserConnector"` (`launch.py` writes it). This is the class that vLLM sees. What it does is done in the
scheduler, which admits requests, gives out ids and seals entries (`scheduler.py`), or in every worker, which moves states between
the store and its blocks (`worker.py`).

Erased text must not come back by way of the prefix cache. Three things see to it:
- A request for an edited context is put under that edit's own secret salt, whatever salt it came with, so that it shares
  no block with any other request.
- It must begin with the very ids the edit was made for, in which the erased ids were replaced by random ones. Otherwise
  it fails.
- Whatever cannot be loaded makes the request fail (`kv_load_failure_policy="fail"`); nothing is computed in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from kveraser.engines.vllm.server.looking import about_readers
from kveraser.engines.vllm.server.scheduler import SchedulerSide
from kveraser.engines.vllm.server.settings import about_eraser, check_adapters, check_cache, geometry_of, looking_at
from kveraser.engines.vllm.server.step import Step
from kveraser.engines.vllm.server.store import EditStore
from kveraser.engines.vllm.server.worker import WorkerSide
from kveraser.errors import OptionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

DEFAULT_CAPACITY_GB = 8.0


class EraserConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps states and serves edited contexts.

    `kv_connector_extra_config`: `store` (folder, required), `capacity_gb`, `eraser` (its PEFT folder: tells sessions its
    window, repair and choice; the probes that tell readers are in there, or in the cache folder).

    Raises:
        UnsupportedCacheError: a model or cache whose states cannot be exchanged.
        OptionError: a configuration that would not fail closed, or lacks the store.
        EraserMismatchError: an eraser of a model of another shape.
        StoreError: the folder cannot be used.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        block_size = check_cache(vllm_config, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "fail":
            raise OptionError(
                f'kv_load_failure_policy is {transfer.kv_load_failure_policy!r}: it must be "fail", since computing what '
                "could not be loaded would bring back what was erased"
            )
        check_adapters(vllm_config)
        options = transfer.kv_connector_extra_config or {}
        if not options.get("store"):
            raise OptionError(
                'kv_connector_extra_config needs "store": a folder that all processes of the engine share'
            )
        capacity = int(float(options.get("capacity_gb", DEFAULT_CAPACITY_GB)) * 2**30)
        store = EditStore(options["store"], capacity, geometry_of(vllm_config))
        eraser = options.get("eraser")
        about = about_eraser(vllm_config, eraser)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role == KVConnectorRole.SCHEDULER:
            looking = looking_at(store, vllm_config, eraser)
            about |= about_readers(looking)
            self._scheduler = SchedulerSide(store, about, looking)
        else:
            self._worker = WorkerSide(store, vllm_config, block_size)

    @property
    def scheduler(self) -> SchedulerSide:
        """Of the connector in the scheduler's process."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> WorkerSide:
        """Of the connector in a worker's process."""
        assert self._worker is not None
        return self._worker

    @property
    def _step(self) -> Step:
        step = self._get_connector_metadata()
        assert isinstance(step, Step)
        return step

    # -- in the scheduler ----------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        self.scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler.build_connector_meta(scheduler_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.scheduler.request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # -- in the workers ------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if (
            self._worker is not None and self._step.observes
        ):  # what is loaded may be loaded after the forward, so that is too late
            self._worker.listen()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        slots = forward_context.slot_mapping
        self.worker.load(self._step, slots if isinstance(slots, dict) else {})

    def wait_for_save(self) -> None:
        self.worker.keep(self._step)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_failed()

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return
