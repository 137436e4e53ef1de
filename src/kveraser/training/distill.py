"""From one example to a loss: what the eraser's pass is judged by.

Knows: models, caches as constants, the eraser. Does not know about optimisers or where examples come from.

Notation of METHOD: the context is `P ++ S ++ X`. The frozen model prefills it once. The eraser re-encodes `S` (with
gradients, from the window of `P` that it will see later), and its keys and values stand in `S`'s slots. Several probes,
each a piece of text whose next tokens matter, are then judged in *one* forward: packed in a row, each attending to the
context and itself alone (4-D mask), at the positions it would have. The teacher does the same on `P ++ X`.

    probe "after"      question and answer, run after the erase
    probe "cached"     the question's states are those computed before the erase; its last token runs again
    probe "continue"   natural text behind the suffix
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kveraser.cache import Window, window_spans
from kveraser.model_view import causal_lm, decoder, evaluating, model_device
from kveraser.spans import Span
from kveraser.tasks import EraseExample
from kveraser.tasks.base import frame_question
from kveraser.training.losses import distillation_loss

Pieces = list[tuple[Tensor, Tensor]]


class _Joined(DynamicLayer):
    """Constant and differentiable pieces of keys and values, shown as one; remembers what a pass adds."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self.pieces = pieces
        self.is_initialized = True
        self.added: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.added = (key_states, value_states)
        pieces = [*self.pieces, self.added]
        return torch.cat([k for k, _ in pieces], -2), torch.cat([v for _, v in pieces], -2)

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.pieces)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


@dataclass(frozen=True)
class Prepared:
    """An example as ids.

    Attributes:
        prefix, span, suffix: ids of the context.
        question: ids of the question, as it stands behind the context.
        answer: ids whose prediction counts.
        gold: whether the answer is a gold one.
        continuation: ids of natural text behind the suffix; may be empty.
    """

    prefix: list[int]
    span: list[int]
    suffix: list[int]
    question: list[int]
    answer: list[int]
    gold: bool
    continuation: list[int]


def prepare(example: EraseExample, encode: Callable[[str], list[int]]) -> Prepared:
    """Tokenise an example. Parts are encoded apart, so that the span's borders are token borders."""
    answer = encode(f" {example.answer}\n")
    return Prepared(
        encode(example.prefix),
        encode(example.span),
        encode(example.suffix),
        encode(frame_question(example.question)),
        answer,
        example.gold is not None,
        encode(example.continuation) if example.continuation else [],
    )


def _run(
    model: nn.Module, ids: list[int], start: int, layers: list[_Joined], mask: Tensor | None = None,
    positions: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Last hidden states `(tokens, hidden)` of ids at positions from `start` on (or at the given ones)."""
    device = model_device(model)
    where = torch.tensor([positions or list(range(start, start + len(ids)))], device=device)
    output = evaluating(decoder(model))(
        input_ids=torch.tensor([ids], device=device), position_ids=where, past_key_values=Cache(layers=list(layers)),
        attention_mask=mask, use_cache=True,
    )  # fmt: skip
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _pieces(cache: Cache, span: Span) -> Pieces:
    return [(layer.keys[:, :, span.slice], layer.values[:, :, span.slice]) for layer in cache.layers]


@dataclass(frozen=True)
class _Probe:
    """Tokens to run: `ids` at positions from `start`; logits from `first` on predict the `targets`."""

    ids: list[int]
    start: int
    targets: list[int]
    gold: bool
    sees_cached_question: bool = False

    @property
    def first(self) -> int:
        return len(self.ids) - len(self.targets)


def _probe_logits(
    model: nn.Module, probes: list[_Probe], layers: list[_Joined], context: int, cached_question: int
) -> Tensor:
    """Logits `(targets of all probes, vocab)` from one forward of the packed probes."""
    ids = [token for probe in probes for token in probe.ids]
    past = context + cached_question
    device = model_device(model)
    visible = torch.zeros(len(ids), past + len(ids), dtype=torch.bool, device=device)
    positions: list[int] = []
    wanted: list[int] = []
    at = 0
    for probe in probes:
        count = len(probe.ids)
        visible[at : at + count, :context] = True
        if probe.sees_cached_question:
            visible[at : at + count, context:past] = True
        own = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        visible[at : at + count, past + at : past + at + count] = own
        positions += range(probe.start, probe.start + count)
        wanted += range(at + probe.first, at + count)
        at += count
    dtype = layers[0].pieces[0][0].dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)
    hidden = _run(model, ids, 0, layers, mask[None, None], positions)
    logits: Tensor = causal_lm(model).get_output_embeddings()(hidden[wanted])
    return logits


def student_loss(
    model: nn.Module,
    steering_model: nn.Module,
    example: Prepared,
    *,
    window: Window | None,
    cross_entropy_weight: float = 0.0,
) -> Tensor:
    """The loss of one example; gradients flow into the eraser alone.

    Args:
        model: the frozen backbone.
        steering_model: a view of it with the eraser attached.
        window: what of the prefix the eraser attends to.
    """
    prefix, span, suffix, question = example.prefix, example.span, example.suffix, example.question
    s, e = len(prefix), len(prefix) + len(span)
    end, shorter = e + len(suffix), s + len(suffix)

    with torch.no_grad():
        cache: Cache = DynamicCache()
        evaluating(decoder(model))(
            input_ids=torch.tensor([[*prefix, *span, *suffix, *question[:-1]]], device=model_device(model)),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        before, behind = _pieces(cache, Span(0, s)), _pieces(cache, Span(e, end))
        asked = _pieces(cache, Span(end, end + len(question) - 1))
        exact_layers = [_Joined([piece]) for piece in before]
        _run(model, suffix, s, exact_layers)
        exact = [layer.added for layer in exact_layers]

        def probes(start: int, cached: bool) -> list[_Probe]:
            known = [*question, *example.answer[:-1]]
            found = [_Probe(known, start, example.answer, example.gold)]
            if cached:
                rerun = [question[-1], *example.answer[:-1]]
                found.append(_Probe(rerun, start + len(question) - 1, example.answer, example.gold, True))
            if len(example.continuation) > 1:
                found.append(_Probe(example.continuation[:-1], start, example.continuation[1:], False))
            return found

        teacher_layers = [_Joined([a, b]) for a, b in zip(before, exact, strict=True) if b is not None]
        teacher = _probe_logits(model, probes(shorter, False), teacher_layers, shorter, 0)
        count = len(example.answer)
        teacher = torch.cat([teacher[:count], teacher])  # the teacher's answer is the same in both protocols

    seen = [
        _Joined([(keys[:, :, run.slice], values[:, :, run.slice]) for run in window_spans(window, s)])
        for keys, values in before
    ]
    _run(steering_model, span, s, seen)
    student_layers = [
        _Joined([a, layer.added, b, q])
        for a, layer, b, q in zip(before, seen, behind, asked, strict=True)
        if layer.added is not None
    ]
    asked_probes = probes(end, True)
    student = _probe_logits(model, asked_probes, student_layers, end, len(question) - 1)
    targets = torch.tensor([token for probe in asked_probes for token in probe.targets], device=student.device)
    gold = torch.tensor([probe.gold for probe in asked_probes for _ in probe.targets], device=student.device)
    return distillation_loss(teacher, student, targets, gold, cross_entropy_weight)
