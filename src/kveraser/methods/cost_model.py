"""What erasing costs on this machine: measured once per model, type and device, then predicted.

Knows: the two shapes of work (running a stretch of tokens, with and without the eraser). Does not know about methods.

Running `n` tokens behind `c` cached ones takes about

    seconds = base + token * n + pair * n * (c + n / 2)

(a fixed cost of the forward, the linear layers, attention). The three numbers are fitted to a few timed passes over
random states, for the plain model and for the model with the eraser in it.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from kveraser.cache import PREFILL_CHUNK, Tokens, rewrite_range
from kveraser.model_view import causal_lm, model_device, model_dtype, text_config
from kveraser.paths import cache_folder, write_atomically
from kveraser.spans import Span

_SHAPES = ((8, 0), (128, 0), (256, 0), (64, 448), (256, 256))
_REPEATS = 2


@dataclass(frozen=True)
class PassCost:
    """Seconds of a pass: `base + token * n + pair * n * (c + n / 2)`."""

    base: float
    token: float
    pair: float

    def seconds(self, tokens: int, cached: int) -> float:
        """Predicted seconds of one pass over `tokens` behind `cached` visible slots."""
        return self.base + self.token * tokens + self.pair * tokens * (cached + tokens / 2)


@dataclass(frozen=True)
class CostModel:
    """Costs of a pass of the plain model, and of one with the eraser active."""

    plain: PassCost
    steering: PassCost

    def recompute(self, start: int, end: int) -> float:
        """Predicted seconds of recomputing slots `[start, end)` in chunks."""
        borders = [*range(start, end, PREFILL_CHUNK), end]
        return sum(self.plain.seconds(b - a, a) for a, b in pairwise(borders))

    def steer(self, steered: int, repaired: int, columns: int) -> float:
        """Predicted seconds of a pass with `steered` tokens under the eraser and `repaired` plain ones, `columns` keys each."""
        alone = self.steering.base + self.steering.token * steered + self.plain.token * repaired
        return alone + (self.steering.pair * steered + self.plain.pair * repaired) * columns


def fit(samples: list[tuple[int, int, float]]) -> PassCost:
    """Fit a `PassCost` to `(tokens, cached, seconds)`; relative errors count alike, no cost is negative."""
    rows = np.array([[1.0, n, n * (c + n / 2)] for n, c, _ in samples])
    seconds = np.array([s for _, _, s in samples])
    active = [0, 1, 2]
    while True:  # least squares with the negative coefficients taken out
        solution, *_ = np.linalg.lstsq(rows[:, active] / seconds[:, None], np.ones(len(samples)), rcond=None)
        if (solution >= 0).all() or len(active) == 1:
            break
        active.pop(int(solution.argmin()))
    costs = [0.0, 0.0, 0.0]
    for index, value in zip(active, solution, strict=True):
        costs[index] = max(float(value), 0.0)
    return PassCost(*costs)


def _time_passes(model: nn.Module, like: nn.Module) -> PassCost:
    config, device, dtype = text_config(like), model_device(like), model_dtype(like)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    longest = max(n + c for n, c in _SHAPES)
    states = torch.zeros(1, heads, longest, head_dim, device=device, dtype=dtype)
    cache: Cache = DynamicCache([(states.clone(), states.clone()) for _ in range(config.num_hidden_layers)])
    tokens = Tokens(torch.ones(1, longest, dtype=torch.long, device=device))
    samples = []
    for count, cached in _SHAPES:
        times = []
        for _ in range(_REPEATS + 1):
            _wait(device)
            started = time.perf_counter()
            rewrite_range(model, cache, tokens, Span(cached, cached + count))
            _wait(device)
            times.append(time.perf_counter() - started)
        samples.append((count, cached, min(times[1:])))
    return fit(samples)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(model: nn.Module, steering_model: nn.Module) -> CostModel:
    """Time both kinds of pass now; takes about as long as prefilling 4,000 tokens."""
    return CostModel(_time_passes(model, model), _time_passes(steering_model, model))


def cost_model(model: nn.Module, steering_model: nn.Module, *, refresh: bool = False) -> CostModel:
    """The cost model of this model on this machine: from the cache folder, or measured and kept there."""
    base = causal_lm(model)
    setting = [str(model_device(base)), str(model_dtype(base)), torch.get_num_threads(), torch.__version__]
    if torch.cuda.is_available():
        setting.append(torch.cuda.get_device_name())
    config = text_config(base)
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, getattr(config, "intermediate_size", 0)]
    key = hashlib.sha256(json.dumps([setting, shape]).encode()).hexdigest()[:16]
    file = cache_folder() / "cost" / f"{key}.json"
    if not refresh:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            return CostModel(PassCost(**data["plain"]), PassCost(**data["steering"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not measured yet, or damaged: measure
    measured = measure(model, steering_model)
    write_atomically(file, json.dumps({"setting": setting, "shape": shape, **asdict(measured)}, indent=2).encode())
    return measured
