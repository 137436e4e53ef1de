"""A live cache of a transformers model: running ahead in it, and its part of a session file.

Knows: `model.generate`, growable caches, safetensors. Does not know about ledgers or text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Self, cast

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kveraser.cache import (
    GrowableLayer,
    Kept,
    TransformersBackend,
    append,
    check_model,
    growable_cache,
    read,
    snapshot,
)
from kveraser.context.backend import Keep, LiveBackend, Run
from kveraser.eraser import KVEraser, default_eraser
from kveraser.errors import SessionFileError
from kveraser.interrupts import uninterrupted
from kveraser.model.attention import for_decoding
from kveraser.model.fingerprint import Fingerprint
from kveraser.model.view import causal_lm, model_device, model_dtype
from kveraser.spans import Span


class LiveTransformers(TransformersBackend, LiveBackend):
    """A growable cache that a model fills.

    Raises:
        UnsupportedCacheError: a model whose cache cannot be edited.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_model(model)
        super().__init__(model, growable_cache())
        self._kept = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return model_device(self.model)

    @property
    def vocabulary(self) -> int:
        return int(causal_lm(self.model).get_input_embeddings().num_embeddings)  # type: ignore[operator]

    def find_eraser(self, given: KVEraser | None) -> KVEraser:
        found = given or default_eraser(self.model)
        found.check_model(self.model)
        return found

    def ends(self, token: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        return token in ends if isinstance(ends, list) else token == ends

    def put(self, span: Span, states: Kept) -> None:
        if not self.cache.layers:
            self.cache.layers.extend(GrowableLayer() for _ in cast("Any", states).states)
        super().put(span, states)

    # -- running ahead -------------------------------------------------------------------------------------------

    @contextmanager
    def ahead(self, drop_last: bool) -> Iterator[Run]:
        with self._scratch(drop_last) as cache:
            yield lambda ids, every: self._run(torch.tensor(ids, device=self.device), cache, every)

    def keep_ahead(self, count: int) -> None:
        self._kept = count

    def _run(self, ids: Tensor, cache: DynamicCache, every: bool) -> Tensor:
        """Run tokens behind a cache; their logits, float32 `(tokens, vocab)`, or of the last alone."""
        rows = []
        for part in ids.split(self.chunk):
            length = cache.get_seq_length()
            where = torch.arange(length, length + len(part), device=self.device)[None]
            with self.reading(for_decoding(self.model)) as model:
                output = model(input_ids=part[None], position_ids=where, past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, 0 if every else -1 :].float())
        return torch.cat(rows)

    @contextmanager
    def _scratch(self, drop_last: bool) -> Iterator[DynamicCache]:
        """The cache to be run ahead (without its last slot, if wanted); when the block ends, what it was, bit for bit, and what is kept."""
        length = self.length
        last = snapshot(self.cache, Span(length - 1, length)) if drop_last else None
        self._kept = 0
        try:
            self.crop(length - drop_last)
            yield self.cache
        finally:
            with uninterrupted():
                self.crop(length - drop_last + self._kept)
                if last is not None:
                    append(self.cache, last)

    def generate(
        self, slots: Tensor, new: Tensor, *, max_new_tokens: int, keep: Keep | None, **options: Any
    ) -> list[int]:
        prompt = torch.cat([slots, new])[None]
        rows = max(self._setting(name, options) for name in ("num_beams", "num_return_sequences"))
        settings = {"do_sample": False, "pad_token_id": self._pad_id(), **options}
        with self._scratch(len(new) == 0) as cache:
            if rows > 1:
                cache = copy.deepcopy(cache)
                cache.batch_repeat_interleave(rows)
            with self.reading(for_decoding(self.model)) as model:
                output = model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache,
                    max_new_tokens=max_new_tokens, **settings,
                )  # fmt: skip
            answer: list[int] = output[0, prompt.shape[1] :].tolist()
            count = len(new) + len(answer) - 1  # the last new token has not been run yet
            if keep and rows == 1 and len(new) and cache.get_seq_length() == len(slots) + count:
                with uninterrupted():
                    self.keep_ahead(count)
                    keep(answer, count)
        return answer

    def _setting(self, name: str, options: dict[str, Any]) -> int:
        """A number that `model.generate` takes from its options, the configuration among them, or the model's own."""
        configured = (options.get("generation_config"), self.model.generation_config)
        return int(options.get(name) or next(filter(None, (getattr(each, name, None) for each in configured)), 1))

    def _pad_id(self) -> int:
        settings = self.model.generation_config
        for value in (settings.pad_token_id, settings.eos_token_id):
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
        return 0

    # -- other caches --------------------------------------------------------------------------------------------

    def fresh(self) -> Self:
        return type(self)(self.model)

    def take_over(self, other: Self, *, wipe: bool = False) -> None:
        if not self.cache.layers:
            self.cache.layers.extend(GrowableLayer() for _ in other.cache.layers)
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.take_over(theirs)
        if wipe:
            other.crop(0)
            other.wipe_spare()

    def wipe_spare(self) -> None:
        for layer in self.cache.layers:
            layer.wipe_spare()

    # -- files ---------------------------------------------------------------------------------------------------

    def pack(self, ids: Tensor) -> tuple[dict[str, Any], bytes]:
        tensors, length = {"ids": ids.contiguous()}, self.length
        if length:
            for number, (keys, values) in enumerate(read(self.cache, Span(0, length))):
                tensors[f"keys.{number:03}"] = keys.contiguous()
                tensors[f"values.{number:03}"] = values.contiguous()
        data = save({name: tensor.cpu() for name, tensor in tensors.items()})
        return {"fingerprint": asdict(Fingerprint.of(self.model)), "length": length}, data

    def unpack(self, index: dict[str, Any], data: bytes) -> Tensor:
        difference = Fingerprint(**index["fingerprint"]).difference(self.model)
        if difference is not None:
            raise SessionFileError(f"the session was saved with another model: {difference}")
        tensors = load(data)
        layers = sorted(name for name in tensors if name.startswith("keys."))
        if layers and (dtype := tensors[layers[0]].dtype) != model_dtype(self.model):
            raise SessionFileError(
                f"the session holds {dtype} states and the model computes in {model_dtype(self.model)}; load it with that dtype"
            )
        if layers:
            pairs = [(tensors[name], tensors[name.replace("keys", "values")]) for name in layers]
            self.cache.layers.extend(GrowableLayer() for _ in layers)
            append(self.cache, [(keys.to(self.device), values.to(self.device)) for keys, values in pairs])
        return tensors["ids"]
