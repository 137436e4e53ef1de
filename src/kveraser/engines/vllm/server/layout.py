"""Reading and writing the paged KV cache of one vLLM worker, whatever the attention backend's layout in a block is.

Knows: vLLM's attention layers and rotary embeddings. Does not know about requests, files or erasing.

Writing uses each layer's own operation, the one that stores new tokens. Reading needs to know where that operation puts
things: this is learned once, by letting it write numbered values into a scratch block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.models.utils import extract_layer_index

from kveraser.errors import UnsupportedCacheError
from kveraser.model.rope import rotate
from kveraser.readers import Turning

_BITS = 7  # numbers up to 128 are exact in every floating-point type


class WorkerCache:
    """The KV cache of one worker: its layers (of a pipeline stage) and heads (of a tensor-parallel rank).

    Args:
        layers: vLLM's attention layers by name.
        block_size: tokens per block, as the scheduler counts them.
        kv_heads: of the whole model.
        rotary: per layer of the whole model, whether its keys are rotated.

    Attributes:
        layers: range of layer numbers.
        heads: range of KV heads.
        writes: whether this worker saves its heads (with more workers than heads, several hold the same).
    """

    def __init__(self, layers: Mapping[str, Any], block_size: int, kv_heads: int, rotary: Sequence[bool]) -> None:
        self._modules = [module for _, module in sorted((extract_layer_index(name), m) for name, m in layers.items())]
        numbers = sorted(extract_layer_index(name) for name in layers)
        self.layers = range(numbers[0], numbers[-1] + 1)
        if numbers != list(self.layers):
            raise UnsupportedCacheError(f"the layers {numbers} of this worker are not consecutive")
        self.block_size, self._rotary = block_size, [rotary[number] for number in self.layers]
        self._all_rotary = tuple(rotary)
        workers, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        first, local = rank * kv_heads // workers, max(kv_heads // workers, 1)
        self.heads = range(first, first + local)
        self.writes = workers <= kv_heads or rank % (workers // kv_heads) == 0
        self._places: dict[str, Tensor] | None = None

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        """Write states `(layers, tokens, kv_heads, head_dim)` of the positions from `start` on.

        Args:
            blocks: block numbers of the request, from its position 0 on.
        """
        slots = self._slots(blocks, start, start + keys.shape[1])
        for number, module in enumerate(self._modules):
            cache = module.kv_cache
            new = (part[number].to(cache.device, cache.dtype).contiguous() for part in (keys, values))
            module.impl.do_kv_cache_update(module, *new, cache, slots.to(cache.device))

    def read(self, blocks: Sequence[int], start: int, end: int) -> tuple[Tensor, Tensor]:
        """States `(layers, tokens, kv_heads, head_dim)` of positions `[start, end)`, on the CPU."""
        first = start // self.block_size
        numbers = list(blocks[first : -(-end // self.block_size)])
        inside = slice(start - first * self.block_size, end - first * self.block_size)
        found: dict[str, list[Tensor]] = {"keys": [], "values": []}
        for module in self._modules:
            cache = module.kv_cache
            places = self._learned(module)
            taken = cache[torch.tensor(numbers, device=cache.device)].reshape(len(numbers), -1)
            for part, kept in found.items():
                states = taken[:, places[part].to(cache.device)]
                kept.append(states.reshape(-1, len(self.heads), cache.shape[-1] // 2)[inside].cpu())
        return torch.stack(found["keys"]), torch.stack(found["values"])

    def moved(self, keys: Tensor, move: int) -> Tensor:
        """Keys `(layers, tokens, kv_heads, head_dim)` as if they stood `move` positions later.

        Raises:
            UnsupportedCacheError: the model has no rotary embedding, or several.
        """
        if move == 0:
            return keys
        inv_freq, pairing = _frequencies()
        turned = rotate(keys.transpose(1, 2), move, inv_freq, pairing).transpose(1, 2)
        return torch.stack([new if turn else old for turn, new, old in zip(self._rotary, turned, keys, strict=True)])

    def listen(self) -> list[list[Tensor]]:
        """Keep the queries `(tokens, heads, head_dim)` that the layers are given from now on, as a list per layer, until `stop_listening`."""
        heard: list[list[Tensor]] = [[] for _ in self._modules]
        for module, kept in zip(self._modules, heard, strict=True):
            plain = module.impl.forward

            def forward(
                layer: Any, query: Tensor, *others: Any, _plain: Any = plain, _kept: list[Tensor] = kept, **options: Any
            ) -> Any:
                _kept.append(query.detach().clone())
                return _plain(layer, query, *others, **options)

            module.impl.forward = forward  # the operation that attends looks it up anew each time, compiled or not
        return heard

    def stop_listening(self) -> None:
        """Leave the layers as they were."""
        for module in self._modules:
            vars(module.impl).pop("forward", None)

    def positions_of(self, slots: Tensor, blocks: Sequence[int], end: int) -> tuple[Tensor, Tensor]:
        """Which rows of a step belong to positions `[0, end)` of a request, and to which.

        Args:
            slots: `(tokens,)`, where the step puts the states of its tokens.
        """
        own = self._slots(blocks, 0, min(end, len(blocks) * self.block_size))
        found = slots.cpu()[:, None] == own[None]
        rows = found.any(1).nonzero()[:, 0]
        return rows, found[rows].int().argmax(1)

    @property
    def turning(self) -> Turning:
        """How the whole model rotates keys.

        Raises:
            UnsupportedCacheError: it has no rotary embedding, or several.
        """
        inv_freq, pairing = _frequencies()
        return Turning(self._all_rotary, pairing, inv_freq)

    def _slots(self, blocks: Sequence[int], start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        numbers = torch.tensor(blocks, dtype=torch.int64)[positions // self.block_size]
        return numbers * self.block_size + positions % self.block_size

    def _learned(self, module: Any) -> dict[str, Tensor]:
        """Where in a flattened block `(block_size, kv_heads, head_dim)` of keys and of values are."""
        if self._places is not None:
            return self._places
        cache = module.kv_cache
        if cache.ndim != 4 or cache.shape[2] != self.block_size:
            raise UnsupportedCacheError(
                f"the attention backend {type(module.impl).__name__} keeps blocks of shape {tuple(cache.shape[1:])}; "
                f"(kv_heads, {self.block_size}, 2 * head_dim) is supported"
            )
        shape = (self.block_size, cache.shape[1], cache.shape[3] // 2)
        count = shape[0] * shape[1] * shape[2]
        numbers = torch.arange(count).reshape(shape)
        slots = torch.arange(self.block_size, device=cache.device)
        places = {}
        for part in ("keys", "values"):
            code = torch.zeros(2 * count, dtype=torch.int64)
            for shift in range(0, count.bit_length(), _BITS):
                scratch = torch.zeros_like(cache[:1])
                coded = (((numbers >> shift) & (2**_BITS - 1)) + 1).to(cache.device, cache.dtype).contiguous()
                nothing = torch.zeros_like(coded)
                new = (coded, nothing) if part == "keys" else (nothing, coded)
                module.impl.do_kv_cache_update(module, *new, scratch, slots)
                seen = scratch.reshape(-1).float().cpu().round().long()
                code += torch.where(seen > 0, (seen - 1) << shift, 0)
                written = (seen > 0).nonzero().squeeze(1)
            if len(written) != count:
                raise UnsupportedCacheError(f"{type(module.impl).__name__} does not store states as they are")
            order = torch.empty(count, dtype=torch.int64)
            order[code[written]] = written
            places[part] = order
        self._places = places
        return places


def _frequencies() -> tuple[Tensor, str]:
    """Frequencies `(rotary_dim / 2,)` in radians per position, and the pairing, of the model this process has built."""
    built = list(rotary_embedding._ROPE_DICT.values())
    if len(built) != 1:
        raise UnsupportedCacheError(
            f"the model has {len(built)} rotary embeddings, moving keys needs exactly one; use an eraser without a "
            "window and without repair"
        )
    rope = built[0]
    with torch.device("cpu"):
        table = rope._compute_cos_sin_cache().double().cpu()
    cos, sin = table.chunk(2, dim=-1)
    angle = torch.atan2(sin, cos)  # a scaling factor on both drops out
    found, step = angle[1], 1
    while 2 * step < len(table):  # every doubling halves the error that the table's float32 brings in
        step *= 2
        turns = ((found * step - angle[step]) / (2 * torch.pi)).round()
        found = (angle[step] + 2 * torch.pi * turns) / step
    return found, "halves" if rope.is_neox_style else "neighbors"
