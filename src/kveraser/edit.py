"""`erase`, `replace`, `restore`, `readers` and `reading` on a plain transformers cache, in place, for people with a generate loop of their own.

Knows: models, caches, token ids. Does not know about text or ledgers; spans are the cache's current positions. `run_edit` and
`run_readers` are for contexts, too, over any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kveraser.cache import (
    Backend,
    Can,
    Eraser,
    Tokens,
    TransformersBackend,
    cache_length,
    check_cache,
    check_editable,
    count_positions,
    extend,
    whole_numbers,
)
from kveraser.eraser import KVEraser, default_eraser
from kveraser.errors import CacheMismatchError, CalibrationError, OptionError, RestoreError
from kveraser.methods import Edit, EraseMethod, EraseReceipt, as_method, put_back, transact
from kveraser.methods.choosing import calibration_of
from kveraser.methods.putting_back import check_put_back
from kveraser.methods.replacing import Change
from kveraser.methods.transaction import check_live
from kveraser.methods.undo import put_back_on_failure
from kveraser.model.view import as_batch, causal_lm
from kveraser.readers import Scene, Text, source_of
from kveraser.spans import Span, merge_spans


def _tokens(
    cache: Cache,
    token_ids: Tensor | list[int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    length: int | None = None,
) -> Tokens:
    """Check ids, mask and positions against the cache (or the given length) and put them together."""
    keys = cache.layers[0].keys
    ids = as_batch(whole_numbers(token_ids), keys.device)
    expected = (keys.shape[0], cache_length(cache) if length is None else length)
    if ids.shape != expected:
        raise CacheMismatchError(
            f"{expected[1]} tokens in {expected[0]} row(s) are needed, token_ids has shape {tuple(ids.shape)}; "
            "give one id per cached token (after an earlier erase: receipt.token_ids(token_ids)); the last generated "
            "token is not in the cache until it has been run"
        )
    mask = positions = None
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask, device=keys.device)
        mask = mask.unsqueeze(0) if mask.ndim == 1 else mask
        if mask.shape != expected:
            raise CacheMismatchError(f"attention_mask has shape {tuple(mask.shape)}, the cache needs {expected}")
        if bool((mask != 0).all()):
            mask = None
        else:
            positions = count_positions(mask)
    if position_ids is not None:
        positions = as_batch(position_ids, keys.device)
        if positions.shape[-1] != expected[1]:
            raise CacheMismatchError(f"position_ids has shape {tuple(positions.shape)}, the cache needs {expected}")
        positions = positions.expand(expected)
    return Tokens(ids, positions, mask)


def _check_vocabulary(model: nn.Module, tokens: Tokens) -> None:
    """Refuse ids that the model does not have; those of padding do not matter."""
    size = causal_lm(model).get_input_embeddings().num_embeddings
    ids = tokens.ids if tokens.mask is None else tokens.ids[tokens.mask != 0]
    wrong = ids[(ids < 0) | (ids >= size)]
    if len(wrong):
        raise OptionError(f"token id {int(wrong[0])} is outside the model's vocabulary of {size}")


def run_edit(
    backend: Backend,
    tokens: Tokens,
    spans: tuple[Span, ...],
    method: EraseMethod,
    find_eraser: Callable[[], Eraser],
    undo: bool,
    commit: Callable[[EraseReceipt], None] | None = None,
    text: Text | None = None,
    changes: tuple[Change, ...] = (),
) -> EraseReceipt:
    """Run one method on checked arguments; `find_eraser` and `text` as of `Edit`, the others as of `transact`."""
    backend.check_rounding()
    edit = Edit(backend, tokens, spans, backend.marks, find_eraser, text)
    with torch.no_grad():
        return transact(method, edit, changes=changes, undo=undo, commit=commit)


def erase(
    model: nn.Module,
    cache: Cache,
    token_ids: Tensor | list[int],
    span: Span | Iterable[Span],
    method: str | EraseMethod | KVEraser = "kveraser",
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    eraser: KVEraser | None = None,
    undo: bool = True,
) -> EraseReceipt:
    """Erase one or several spans from a live cache, in place.

    Args:
        model: the causal language model that filled the cache.
        cache: a `DynamicCache` of `tokens` slots; batch rows share the span.
        token_ids: `(tokens,)` or `(batch, tokens)`, one id per slot.
        span: current cache positions; several are erased in one transaction.
        method: a name (see `methods()`), an `EraseMethod` or a `KVEraser`.
        attention_mask: `(batch, tokens)`, 0 for padding; positions are then counted as `model.generate` does.
        position_ids: `(batch, tokens)`, when the cache was filled with other positions.
        eraser: for `kveraser` and `auto`; None takes the one that ships for the model.
        undo: keep what is needed for `restore` in the receipt.

    Returns:
        The receipt; `receipt.token_ids(token_ids)` are the ids that go with the cache now.

    Raises:
        SpanError, UnsupportedCacheError, CacheMismatchError, EraserMismatchError, OptionError: nothing was changed.
    """
    chosen = as_method(method)
    tokens = _checked(model, cache, chosen, token_ids, attention_mask, position_ids)
    spans = merge_spans([span] if isinstance(span, Span) else span, tokens.length)
    backend = TransformersBackend(model, cache)
    return run_edit(backend, tokens, spans, chosen, lambda: eraser or default_eraser(model), undo)


def replace(
    model: nn.Module,
    cache: Cache,
    token_ids: Tensor | list[int],
    span: Span,
    new_ids: Tensor | list[int],
    method: str | EraseMethod | KVEraser = "kveraser",
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    eraser: KVEraser | None = None,
    undo: bool = True,
) -> EraseReceipt:
    """Let a span of a live cache say something else, in place, as if the context had always said it.

    New tokens are computed behind what is before the span. A shorter text leaves slots over, which the method drops or hides; for a
    longer one what follows moves. Equal ids change nothing, none at all erase.

    Args:
        model, cache, token_ids, method, attention_mask, position_ids, eraser, undo: as for `erase`.
        span: current cache positions, without padding in any row.
        new_ids: `(n,)` for all rows, or `(batch, n)`.

    Returns:
        The receipt, for `restore` as any other. `receipt.token_ids(token_ids)` are the ids that go with the cache now,
        `receipt.replacement` is where the new ones are among them.

    Raises:
        SpanError, UnsupportedCacheError, CacheMismatchError, EraserMismatchError, OptionError: nothing was changed.
    """
    chosen = as_method(method)
    tokens = _checked(model, cache, chosen, token_ids, attention_mask, position_ids)
    spans = merge_spans([span], tokens.length)
    new = as_batch(whole_numbers(new_ids), tokens.ids.device).long()
    if new.shape[0] not in (1, tokens.ids.shape[0]):
        raise CacheMismatchError(f"new_ids has {new.shape[0]} rows, the cache has {tokens.ids.shape[0]}")
    _check_vocabulary(model, Tokens(new))
    backend = TransformersBackend(model, cache)
    changes = (Change(spans[0], new.expand(tokens.ids.shape[0], -1)),)
    return run_edit(backend, tokens, spans, chosen, lambda: eraser or default_eraser(model), undo, changes=changes)


def _checked(
    model: nn.Module,
    cache: Cache,
    method: EraseMethod,
    token_ids: Tensor | list[int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tokens:
    """The tokens of a cache that a method is to edit, once all is known to fit together."""
    if method.removes:
        check_editable(model, cache)
    else:
        check_cache(cache)
    tokens = _tokens(cache, token_ids, attention_mask, position_ids)
    _check_vocabulary(model, tokens)
    return tokens


@torch.no_grad()
def readers(
    model: nn.Module,
    cache: Cache,
    token_ids: Tensor | list[int],
    span: Span | Iterable[Span],
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    eraser: KVEraser | None = None,
) -> Tensor:
    """How much each token behind a span has attended to it: who would have to be recomputed to erase it.

    Told from the cached keys and values (`kveraser.readers`), in the layers whose attention tells most; nothing is run
    but, once per model, what calibrates it.

    Args:
        model, cache, token_ids, span, attention_mask, position_ids: as for `erase`.
        eraser: whose calibration is used; None takes that of the model's own eraser.

    Returns:
        `(batch, suffix)` float32, one column for each slot from the first span's end on: a share of its attention, the
        largest of any head, mean over layers; 0 for padding, for erased slots and for those of the spans.

    Raises:
        SpanError, UnsupportedCacheError, CacheMismatchError: as for `erase`.
        CalibrationError: too little text to calibrate on, or keys and values that tell too little.
    """
    check_editable(model, cache)
    tokens = _tokens(cache, token_ids, attention_mask, position_ids)
    _check_vocabulary(model, tokens)
    spans = merge_spans([span] if isinstance(span, Span) else span, tokens.length)
    found = run_readers(TransformersBackend(model, cache), tokens, spans, lambda: eraser or default_eraser(model))
    return found[:, spans[0].end :]


@contextmanager
def reading(model: PreTrainedModel, cache: Cache) -> Iterator[Any]:
    """The model to read later tokens with behind an erase that moved nothing, for the time of the block.

    What was erased in place leaves a gap in positions. In the block, tokens that are run with the model given there (`model(...)`,
    `model.generate(...)`) see what was before the gap as if there were none, as they do in an `ErasableContext`. It is a view of the user's model, which
    stays as it is; where nothing was hidden in place it is that model itself.

    Args:
        model, cache: as given to `erase`.

    Raises:
        UnsupportedCacheError: rows are padded (by the call within the block).
    """
    with TransformersBackend(model, cache).reading() as reader:
        yield reader


@torch.no_grad()
def run_readers(
    backend: Backend,
    tokens: Tokens,
    spans: tuple[Span, ...],
    find_eraser: Callable[[], Eraser],
    text: Text | None = None,
) -> Tensor:
    """`readers` of checked arguments, `(batch, slots)`: also of the slots before the spans, where it is 0.

    Raises:
        SpanError: a span holds slots that are erased already.
        OptionError: a backend that does not show its states.
    """
    if Can.TELL not in backend.can:
        raise OptionError(f"{backend.name} does not show its states, so who has read a span cannot be told there")
    backend.check_rounding()
    edit = Edit(backend, tokens, spans, backend.marks, find_eraser, text)
    check_live(edit)
    calibration = calibration_of(edit, find_eraser().calibration)
    if not calibration.tells:
        raise CalibrationError(
            f"keys and values explain {calibration.explained:.0%} of this model's queries, which is too little to tell "
            "readers by (a longer context, or `kveraser.readers.calibrate` on some text, may help)"
        )
    scene = Scene.of(source_of(backend), tokens, spans, edit.marks.steered_spans, calibration)
    found = torch.zeros(tokens.ids.shape, device=tokens.ids.device)
    if len(scene.suffix):
        found[:, scene.suffix] = scene.everywhere()
    return found if tokens.mask is None else found * tokens.mask


def restore(
    cache: Cache,
    receipt: EraseReceipt,
    *,
    model: nn.Module | None = None,
    token_ids: Tensor | list[int] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> int:
    """Undo an erase. Bit-exact when nothing was appended since.

    Tokens appended since saw the erased context. Given `model`, and `token_ids`, `attention_mask` and `position_ids` (as for
    `erase`) of the cache as it will be after restoring (the ids before the erase, then the later ones), they are kept and
    their states recomputed.

    Returns:
        How many later tokens were recomputed.

    Raises:
        RestoreError: tokens were appended and no model was given, rows of the batch were moved, or the receipt cannot be restored
            for another reason (says which).
        CacheMismatchError: ids that do not fit. In every case the cache is left as it was.
    """
    check_cache_or_empty(cache)
    backend = TransformersBackend(model, cache)
    marks, undo, tokens = backend.marks, check_put_back(backend, receipt), None
    later = backend.length - next(edit.length_after for edit in marks.edits if edit.id == receipt.id)
    if later:
        if model is None or token_ids is None:
            raise RestoreError(
                f"{later} token(s) were appended since the erase; give model= and token_ids= to keep and recompute "
                f"them, or drop them first with cache.crop(-{later})"
            )
        tokens = _tokens(cache, token_ids, attention_mask, position_ids, undo.length + later)
        _check_vocabulary(model, tokens)
        backend.check_rounding()
    with put_back_on_failure(backend, marks, undo.layout_from, undo.kept):
        put_back(backend, receipt)
        if tokens is not None:
            backend.crop(undo.length)
            extend(backend.model, cache, tokens, backend.chunk)
    return later


def check_cache_or_empty(cache: Cache) -> None:
    """`check_cache`, but an emptied cache passes: everything may have been erased."""
    if isinstance(cache, Cache) and cache.layers and cache_length(cache) == 0:
        return
    check_cache(cache)
