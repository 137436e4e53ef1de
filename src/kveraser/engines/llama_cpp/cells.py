"""One llama.cpp context: its KV cells, and running tokens.

Knows: the calls that read, write and rename cells, and what they require. Does not know about spans of text or erasing.

A cell holds one token's keys and values and belongs to one or both of two sequences. `LIVE` is the user's; `WORK` is where
passes run: it is given cells of `LIVE` to attend to (which shares them, nothing is copied), tokens are run behind these,
and the new cells are handed over. llama.cpp ends the process when some of its requirements are not met (cells of several
streams, more positions than one per token, an unknown sequence); everything is checked here before it is called.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from kveraser.engines.llama_cpp.library import captured, lib, said
from kveraser.engines.llama_cpp.model import LlamaCppModel
from kveraser.engines.llama_cpp.packed import SMALLEST_HADAMARD, Packed, States, hadamard_form
from kveraser.errors import ContextError, EngineError, OptionError, RestoreError
from kveraser.spans import Span

LIVE, WORK = 0, 1
BATCH = 512
"""Tokens per forward; every call of `run` is cut into such pieces."""

KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2}
"""Types of the cache whose keys llama.cpp can move (it cannot rotate bfloat16 ones)."""
_BLOCK = 32
_FEWEST = 2
"""Outputs per forward below which llama.cpp ends the process: one for each sequence."""

Outputs = Literal["none", "last", "all"]
Listener = Callable[[Any, bool], bool]
"""Is shown every tensor of a forward: asked first whether it wants to see it, then (if so) shown it when it is computed."""


class Cells:
    """The KV cache of one context.

    Args:
        model: loaded model.
        length: tokens it is to hold.
        keys, values: type of the cached keys and values, one of `KV_TYPES`.
        flash_attention: None leaves it to llama.cpp; quantised values need it.
        outputs: tokens per forward that may have logits; 0 for all.
        listener: is shown what forwards compute.

    Raises:
        OptionError: an impossible length or type.
        EngineError: llama.cpp cannot make the context, most often for lack of memory.
    """

    def __init__(
        self,
        model: LlamaCppModel,
        length: int,
        keys: str,
        values: str,
        flash_attention: bool | None = None,
        *,
        outputs: int = 0,
        listener: Listener | None = None,
    ) -> None:
        self.model = model
        self._check_options(length, keys, values, flash_attention)
        self.length = length
        self.bytes_per_token = int(model.values_per_token * (_bytes(keys) + _bytes(values)))
        """Bytes of one token's keys and values."""
        self.keys, self.values, self.flash_attention = keys, values, flash_attention
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = length + 1  # one cell more, for `settle`
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_outputs_max = outputs
        parameters.n_seq_max, parameters.kv_unified = 2, True
        parameters.n_threads = parameters.n_threads_batch = model.threads
        parameters.type_k, parameters.type_v = KV_TYPES[keys], KV_TYPES[values]
        parameters.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
        if listener is not None:
            self._listener = lib.llama_cpp.ggml_backend_sched_eval_callback(
                lambda tensor, asked, _: listener(tensor, asked)
            )
            parameters.cb_eval = self._listener
        with captured() as messages:
            self._handle: Any = lib.llama_init_from_model(model.handle, parameters)
        if not self._handle:
            raise EngineError(f"llama.cpp cannot make a context of {length} tokens: {said(messages)}")
        self._memory = lib.llama_get_memory(self._handle)
        self._batch = lib.llama_batch_init(BATCH, 0, 1)
        self.close = weakref.finalize(self, _free, self._handle, self._batch, model)
        if not lib.llama_memory_can_shift(self._memory):
            self.close()
            raise EngineError(
                f"llama.cpp cannot move the cached keys of {model.file.name}; process the text again instead"
            )

    def _check_options(self, length: int, keys: str, values: str, flash_attention: bool | None) -> None:
        if not 1 <= length <= 1 << 24:
            raise OptionError(f"a context of {length} tokens cannot be; give from 1 to {1 << 24}")
        for name, kind in (("keys", keys), ("values", values)):
            if kind not in KV_TYPES:
                raise OptionError(f"cached {name} of type {kind!r} cannot be edited; there are: {', '.join(KV_TYPES)}")
            if kind.startswith("q") and self.model.head_size % _BLOCK:
                raise OptionError(
                    f"{name} of type {kind} need heads of a multiple of {_BLOCK} dimensions, {self.model.file.name} has "
                    f"{self.model.head_size}; use f16"
                )
        if values.startswith("q") and flash_attention is False:
            raise OptionError(f"values of type {values} need flash attention; leave flash_attention out, or use f16")

    @property
    def settings(self) -> dict[str, str | bool | None]:
        """How it was made, for a saved session."""
        return {"keys": self.keys, "values": self.values, "flash_attention": self.flash_attention}

    def beside(self, length: int) -> Cells:
        """Another cache of the same kind, for passes that need no logits."""
        return Cells(self.model, length, self.keys, self.values, self.flash_attention, outputs=_FEWEST)

    @property
    def rounds_again(self) -> bool:
        """Whether moving some keys rounds all of them anew."""
        return self.keys.startswith("q")

    def check_movable(self) -> None:
        """Refuse to move keys where llama.cpp's rotation would end the process.

        Raises:
            OptionError: quantised keys that are not stored in Hadamard form, which the rotation takes for granted.
        """
        if self.rounds_again and not hadamard_form(self.model.head_size):
            raise OptionError(
                f"keys of type {self.keys} with heads of {self.model.head_size} dimensions cannot be moved by "
                f"this llama.cpp (it needs a multiple of {SMALLEST_HADAMARD}, and LLAMA_ATTN_ROT_DISABLE unset); use "
                "'kveraser:repair=0' or 'full-recompute', or make the context with keys='f16'"
            )

    # -- cells ---------------------------------------------------------------------------------------------------

    def end(self, sequence: int) -> int:
        """The position behind a sequence's last cell; 0 when it has none."""
        return int(lib.llama_memory_seq_pos_max(self._memory, _known(sequence))) + 1

    def share(self, source: int, target: int, span: Span) -> None:
        """Let the cells at these positions of one sequence belong to the other as well."""
        lib.llama_memory_seq_cp(self._memory, _known(source), _known(target), span.start, span.end)

    def remove(self, sequence: int, span: Span | None = None) -> None:
        """Take cells (None: all) from a sequence; those that then belong to none are free."""
        start, end = (span.start, span.end) if span else (-1, -1)
        if not lib.llama_memory_seq_rm(self._memory, _known(sequence), start, end):
            raise EngineError(f"llama.cpp cannot drop the cells {span} of this model's cache")

    def move(self, sequence: int, span: Span, delta: int) -> None:
        """Move cells (which belong to no other sequence) to other positions; their keys follow at `settle`."""
        if span.start + delta < 0:
            raise EngineError(f"cells at {span} cannot be moved by {delta}, to before position 0")
        lib.llama_memory_seq_add(self._memory, _known(sequence), span.start, span.end, delta)

    def settle(self, token: int) -> None:
        """Rotate the keys of moved cells now. llama.cpp does it before the next forward only, so this runs one token."""
        self.remove(WORK)
        try:
            self.run([token], 0, WORK)
        finally:
            self.remove(WORK)

    def read(self, spans: Sequence[Span]) -> States:
        """A copy of the cells at these positions of `LIVE`, in llama.cpp's own format (positions included)."""
        self.remove(WORK)
        try:
            for span in spans:
                self.share(LIVE, WORK, span)
            return self._read_work()
        finally:
            self.remove(WORK)

    def _read_work(self) -> States:
        size = int(lib.llama_state_seq_get_size(self._handle, WORK))
        states = np.empty(size, np.uint8)
        pointer = states.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if int(lib.llama_state_seq_get_data(self._handle, pointer, size, WORK)) != size:
            raise EngineError("llama.cpp cannot copy cells")
        return states

    def holds(self, position: int) -> bool:
        """Whether there is a cell at a position of `LIVE`; a hidden one has none."""
        return len(Packed(self.read([Span(position, position + 1)]), self.model.anatomy)) > 0

    def turn_work(self, start: int, delta: int) -> None:
        """Let the cells of `WORK` from `start` on be the only ones there, moved by so many positions; their keys are rounded again."""
        if start:
            self.remove(WORK, Span(0, start))
        packed = Packed(self._read_work(), self.model.anatomy)
        packed.turn(delta)
        self._write_work(packed.states)

    def write(self, states: States) -> None:
        """Put copied cells back to their positions in `LIVE`, which must be free.

        Raises:
            RestoreError: llama.cpp does not take them; nothing was changed.
        """
        if not len(states):
            return
        self._write_work(states)
        lib.llama_memory_seq_cp(self._memory, WORK, LIVE, -1, -1)
        self.remove(WORK)

    def _write_work(self, states: States) -> None:
        pointer = states.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        with captured() as messages:
            taken = int(lib.llama_state_seq_set_data(self._handle, pointer, len(states), WORK))
        if taken != len(states):
            self.remove(WORK)
            raise RestoreError(f"llama.cpp does not take the saved cells back: {said(messages)}")

    def wipe(self) -> None:
        """Free all cells and overwrite their memory."""
        lib.llama_memory_clear(self._memory, True)

    # -- running -------------------------------------------------------------------------------------------------

    @contextmanager
    def adapter(self, adapter: Any) -> Iterator[None]:
        """Run with a LoRA, if one is given, while the block runs."""
        if adapter is None:
            yield
            return
        self._set_adapters([adapter])
        try:
            yield
        finally:
            self._set_adapters([])

    def _set_adapters(self, adapters: list[Any]) -> None:
        count = len(adapters)
        handles = (lib.llama_adapter_lora_p_ctypes * count)(*adapters)
        scales = (ctypes.c_float * count)(*([1.0] * count))
        with captured() as messages:
            refused = lib.llama_set_adapters_lora(
                self._handle, handles if count else None, count, scales if count else None
            )
        if refused:
            raise EngineError(f"llama.cpp refuses the eraser's adapter for this context: {said(messages)}")

    def run(
        self, ids: Sequence[int], start: int, sequence: int, outputs: Outputs = "none", chunk: int = BATCH
    ) -> NDArray[np.float32]:
        """Run tokens at positions `start`, `start + 1`, ... of a sequence, and keep their cells.

        Args:
            outputs: which logits to return.
            chunk: tokens per forward, at most `BATCH`.

        Returns:
            Logits `(tokens, vocabulary)`: none, one or all rows.

        Raises:
            ContextError: an id outside the vocabulary, or no room.
            EngineError: llama.cpp refuses; cells of the tokens before the refusal are there.
        """
        bad = next((token for token in ids if not 0 <= token < self.model.vocabulary), None)
        if bad is not None:
            raise ContextError(f"token id {bad} is outside the model's vocabulary of {self.model.vocabulary}")
        before = self.end(sequence)
        if before and before != start:
            raise EngineError(
                f"tokens at {start} cannot follow a sequence that ends at {before}: llama.cpp takes no gaps"
            )
        if not 1 <= chunk <= BATCH:
            raise OptionError(f"chunk={chunk} must be from 1 to {BATCH}, llama.cpp's batch here")
        rows = []
        for at in range(0, len(ids), chunk):
            part = ids[at : at + chunk]
            wanted = outputs == "all" or (outputs == "last" and at + chunk >= len(ids))
            self._decode(part, start + at, sequence, wanted, outputs == "all")
            if wanted:
                rows += [self._logits(i) for i in (range(len(part)) if outputs == "all" else [len(part) - 1])]
        if not rows:
            lib.llama_synchronize(self._handle)
            return np.empty((0, self.model.vocabulary), np.float32)
        return np.stack(rows)

    def _decode(self, ids: Sequence[int], start: int, sequence: int, last: bool, every: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, int(every)
        batch.logits[len(ids) - 1] = int(every or last)
        with captured() as messages:
            code = int(lib.llama_decode(self._handle, batch))
        if code == 1:
            raise ContextError(
                f"the context is full: {len(ids)} more tokens do not fit into {self.length} cells; make it with more"
            )
        if code:
            raise EngineError(
                f"llama.cpp cannot run {len(ids)} tokens at position {start} (code {code}): {said(messages)}"
            )

    def _logits(self, row: int) -> NDArray[np.float32]:
        pointer = lib.llama_get_logits_ith(self._handle, row)
        if not pointer:
            raise EngineError(f"llama.cpp gives no logits for row {row}")
        return np.ctypeslib.as_array(pointer, (self.model.vocabulary,)).copy()


def _bytes(kind: str) -> float:
    """Bytes per value of a type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(KV_TYPES[kind])]
    return float(size / block)


def _known(sequence: int) -> int:
    if sequence not in (LIVE, WORK):
        raise EngineError(f"there is no sequence {sequence} here")
    return sequence


def _free(handle: Any, batch: Any, model: LlamaCppModel) -> None:
    """Free the context before its model, which this call keeps alive."""
    with captured():
        lib.llama_batch_free(batch)
        lib.llama_free(handle)
