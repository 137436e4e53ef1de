"""What erasing costs on this machine: measured once per model, type and device, then predicted.

Knows: the shapes of work (running a stretch of tokens, with and without the eraser, and telling who has read a span). Does not know
about methods.

Running `n` tokens behind `c` cached ones takes about

    seconds = base + token * n + pair * n * (c + n / 2)

(a fixed cost of the forward, the linear layers, attention). The three numbers are fitted to a few timed passes over
random states, for the plain model and for the model with the eraser in it. Telling readers takes `base + token * suffix`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from kveraser.cache import PREFILL_CHUNK, Tokens, prefill_chunk, rewrite_range
from kveraser.files import cache_folder, digest_json, enclosed, opened, write_atomically
from kveraser.model.view import causal_lm, finish, kv_shape, model_device, model_dtype, text_config
from kveraser.readers import Calibration, ModelSource, Scene
from kveraser.spans import Span

_SHAPES = ((8, 0), (128, 0), (256, 0), (64, 448), (256, 256))
_REPEATS = 2
_SCANNED = (512, 4096)
_CLOSE, _CHOSEN, _SHOWN = 512, 64, 1536
_FORMAT = 3


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
    """Costs of a pass of the plain model, of one with the eraser active, and of telling readers in a suffix.

    Attributes:
        chunk: tokens per pass of a long prefill.
    """

    plain: PassCost
    steering: PassCost
    telling: PassCost = field(default_factory=lambda: PassCost(0.0, 0.0, 0.0))
    chunk: int = PREFILL_CHUNK

    def recompute(self, start: int, end: int) -> float:
        """Predicted seconds of recomputing slots `[start, end)` in chunks."""
        borders = [*range(start, end, self.chunk), end]
        return sum(self.plain.seconds(b - a, a) for a, b in pairwise(borders))

    def steer(self, steered: int, repaired: int, columns: int) -> float:
        """Predicted seconds of a pass with `steered` tokens under the eraser and `repaired` plain ones, `columns` keys each."""
        alone = self.steering.base + self.steering.token * steered + self.plain.token * repaired
        return alone + (self.steering.pair * steered + self.plain.pair * repaired) * columns

    def tell(self, suffix: int, candidates: int = 0) -> float:
        """Predicted seconds of telling who in a suffix has read a span, with so many close looks (512 at least)."""
        looked = self.telling.seconds(_CLOSE, 0) / _CLOSE
        return self.telling.seconds(suffix, 0) + looked * max(min(candidates, suffix) - _CLOSE, 0)


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


def _empty_cache(model: nn.Module, length: int) -> Cache:
    layers, heads, head_dim = kv_shape(model)
    states = torch.zeros(1, heads, length, head_dim, device=model_device(model), dtype=model_dtype(model))
    return DynamicCache([(states.clone(), states.clone()) for _ in range(layers)])


def _best_time(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        finish(device)
        started = time.perf_counter()
        work()
        finish(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _time_passes(model: nn.Module, like: nn.Module) -> PassCost:
    longest, device = max(n + c for n, c in _SHAPES), model_device(like)
    cache = _empty_cache(like, longest)
    tokens = Tokens(torch.ones(1, longest, dtype=torch.long, device=device))
    samples = []
    for count, cached in _SHAPES:
        span = Span(cached, cached + count)
        samples.append((count, cached, _best_time(partial(rewrite_range, model, cache, tokens, span), device)))
    return fit(samples)


def _time_telling(model: nn.Module, calibration: Calibration) -> PassCost:
    if not calibration.tells:
        return PassCost(0.0, 0.0, 0.0)
    device, seconds = model_device(model), []
    for length in _SCANNED:
        cache = _empty_cache(model, length + 8)
        tokens = Tokens(torch.ones(1, length + 8, dtype=torch.long, device=device))

        def tell(cache: Cache = cache, tokens: Tokens = tokens) -> None:
            scene = Scene.of(ModelSource(model, cache), tokens, (Span(4, 8),), (), calibration)
            slots = scene.suffix
            scene.thin()
            scene.close(slots[:_CLOSE])
            scene.needed(slots[-_CHOSEN:], _SHOWN)

        seconds.append(_best_time(tell, device))
    token = max(seconds[1] - seconds[0], 0.0) / (_SCANNED[1] - _SCANNED[0])
    return PassCost(max(seconds[0] - token * _SCANNED[0], 0.0), token, 0.0)


@torch.no_grad()
def measure(model: nn.Module, steering_model: nn.Module, calibration: Calibration) -> CostModel:
    """Time all kinds of work now; takes about as long as prefilling 4,000 tokens."""
    plain = _time_passes(model, model)
    steering = plain if steering_model is model else _time_passes(steering_model, model)
    return CostModel(plain, steering, _time_telling(model, calibration), prefill_chunk(model_device(model)))


def cost_model(
    model: nn.Module, steering_model: nn.Module, calibration: Calibration, *, refresh: bool = False
) -> CostModel:
    """The cost model of this model on this machine: from the cache folder, or measured and kept there.

    Args:
        steering_model: a view of it with the eraser in it; the model itself for a neutral eraser.
        calibration: what readers are told by.
    """
    base = causal_lm(model)
    device = model_device(base)
    setting = [str(device), str(model_dtype(base)), torch.get_num_threads(), torch.__version__]
    if device.type == "cuda":
        setting.append(torch.cuda.get_device_name(device))
    config = text_config(base)
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, getattr(config, "intermediate_size", 0)]
    kinds = ["neutral" if steering_model is model else "trained", calibration.tells]
    key = digest_json([_FORMAT, setting, shape, kinds])[:16]
    file = cache_folder() / "cost" / f"{key}.json"
    if not refresh:
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            data = opened(said, _FORMAT, file) if "body" in said else said  # older ones have no checksum
            plain, steering, telling = (PassCost(**data[name]) for name in ("plain", "steering", "telling"))
            return CostModel(plain, steering, telling, prefill_chunk(device))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not measured yet, or damaged: measure
    measured = measure(model, steering_model, calibration)
    body = {"setting": setting, "shape": shape, "kinds": kinds, **asdict(measured)}
    write_atomically(file, enclosed(body, _FORMAT, indent=2))
    return measured
