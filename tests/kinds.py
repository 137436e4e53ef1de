"""The kinds of live contexts that the context suite runs over: transformers, llama.cpp where it is installed, and a toy engine.

Adding an engine to the suite is adding a `Kind` to `KINDS`.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from toy import ToyBackend, ToyContext, ToyEraser

import kveraser as kv
from conftest import make_tokenizer, prefill, random_eraser, relative, states, text_model, tiny
from kveraser.cache import Can

QUESTION = [5, 6, 9, 11]


class Kind:
    """How the suite makes contexts of one kind, and looks at their states."""

    name: str
    can: frozenset[Can]
    installed = True
    tolerance = 1e-4
    """How far a context that says it is exact may be from a fresh one."""

    def context(self, **eraser):
        """An empty context of ids, whose eraser has these options (window, repair)."""
        raise NotImplementedError

    def text_context(self):
        """An empty context of text."""
        raise NotImplementedError

    def load(self, folder, context):
        """The session in a folder, with model and eraser of another context."""
        raise NotImplementedError

    def states(self, context):
        """Copies of all states, as a list of tensors whose bits can be compared."""
        raise NotImplementedError

    def of_slots(self, context, slots):
        """Copies of the states of some slots."""
        raise NotImplementedError

    def by_slot(self, context, length):
        """The same of each of the first slots, apart."""
        return [self.of_slots(context, [slot]) for slot in range(length)]

    def holds(self, tensor, old):
        """Whether a tensor, in its unused parts too, holds any of some old states."""
        return any(
            bool(torch.isin(state.double(), tensor.double()).any()) for state in old if state.is_floating_point()
        )

    def in_files(self, old):
        """Bytes of old states that a session's file would hold."""
        return [state[0].numpy().tobytes() for state in old]

    def running(self, context):
        """What to patch so that running tokens fails."""
        raise NotImplementedError

    @property
    def methods(self):
        """Every method that it can do, and some with options."""
        names = [name for name, method in kv.methods().items() if name != "no-erase" and method.needs <= self.can]
        chosen = ["attention-guided-repair:tokens=5"] if Can.TELL in self.can else []
        return [*names, "kveraser:repair=6", *chosen]

    def off(self, context):
        """How far a context is from a fresh one of its live ids."""
        fresh = self.context()
        fresh.append_ids(context.live_ids)
        return relative([context.logits_ids(QUESTION)], [fresh.logits_ids(QUESTION)])

    @contextmanager
    def failing(self, context, error):
        """Running any token raises an error."""

        def fail(*_, **__):
            raise error

        with patch.object(*self.running(context), fail):
            yield

    def steering(self, repair, *, neutral=False):
        """Steering that recomputes so many tokens, by the context's eraser or, where there is one, a neutral one."""
        return kv.Steering(repair=repair)


class Transformers(Kind):
    name = "transformers"
    can = frozenset(Can)

    def context(self, **eraser):
        return kv.ErasableContext(tiny(), eraser=random_eraser(tiny(), **eraser))

    def text_context(self):
        return kv.ErasableContext(text_model(), make_tokenizer(), random_eraser(text_model()))

    def load(self, folder, context):
        return kv.ErasableContext.load(folder, context.model, context.tokenizer, context.eraser)

    def states(self, context):
        return states(context.cache)

    def off(self, context):
        return relative(states(context.cache), states(prefill(context.model, torch.tensor([context.live_ids]))))

    def of_slots(self, context, slots):
        return [tensor[:, :, list(slots)] for tensor in states(context.cache)]

    def by_slot(self, context, length):
        every = states(context.cache)
        return [[tensor[:, :, [slot]] for tensor in every] for slot in range(length)]

    def holds(self, tensor, old):
        # Layer 0's values depend on the token alone, and the secret's letters occur elsewhere: look at the layers above.
        whole = tensor.untyped_storage().nbytes() // tensor.element_size()
        spare = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (whole,))
        return any(bool(torch.isin(state[state != 0], spare).any()) for state in old[2:]) and tensor.ndim == 4

    def in_files(self, old):
        return [state[0, 0, 0].numpy().tobytes() for state in old[2:]]

    def running(self, context):
        return context.model.model.layers[1], "forward"

    def steering(self, repair, *, neutral=False):
        return kv.Steering(kv.KVEraser.neutral(tiny()) if neutral else None, repair=repair, keys=None)


class LlamaCpp(Kind):
    name = "llama.cpp"
    installed = find_spec("llama_cpp") is not None
    tolerance = 1e-3

    @property
    def can(self):
        from kveraser.engines.llama_cpp.backend import LlamaCppBackend

        return LlamaCppBackend.can

    @cached_property
    def folder(self):
        self._folder = tempfile.TemporaryDirectory()
        return Path(self._folder.name)

    @cached_property
    def both(self):
        from kveraser.engines.llama_cpp import LlamaCppModel
        from llama_cpp_helpers import tiny_pair

        backbone = tiny_pair(self.folder / "tiny.gguf", tokenizer=make_tokenizer())
        return backbone, LlamaCppModel(self.folder / "tiny.gguf", threads=1)

    def eraser(self, **options):
        backbone, model = self.both
        folder = self.folder / f"eraser-{sorted(options.items())}"
        if not folder.exists():
            random_eraser(backbone, choose="next", **options).save_pretrained(folder, dtype=torch.float32)
        return model.find_eraser(folder)

    def context(self, **eraser):
        from kveraser.engines.llama_cpp import LlamaCppContext

        kinds = {"keys": "f32", "values": "f32", "flash_attention": False}
        return LlamaCppContext(self.both[1], self.eraser(**eraser), length=512, **kinds)

    text_context = context

    def load(self, folder, context):
        from kveraser.engines.llama_cpp import LlamaCppContext

        return LlamaCppContext.load(folder, context.model, context.eraser)

    def of_slots(self, context, slots):
        read = [context.backend.cells.read([kv.Span(slot, slot + 1)]) for slot in slots]
        # A rotation by nothing, which llama.cpp applies to all keys when some are moved, may flip the sign of zeros.
        return [torch.from_numpy(np.where(states == 0x80, 0, states)) for states in read]

    def states(self, context):
        return self.of_slots(context, range(context.backend.length))

    def in_files(self, old):
        return [state[-64:].numpy().tobytes() for state in old]  # of the last layer's value

    def running(self, context):
        from kveraser.engines.llama_cpp.cells import Cells

        return Cells, "_decode"


class Toy(Kind):
    name = "toy"
    can = ToyBackend.can

    def context(self, **eraser):
        return ToyContext(eraser=ToyEraser(**eraser))

    def text_context(self):
        return ToyContext(make_tokenizer(), ToyEraser())

    def load(self, folder, context):
        return ToyContext.load(folder, context.tokenizer, context.eraser)

    def states(self, context):
        return [context.backend.rows.clone()]

    def of_slots(self, context, slots):
        return [context.backend.rows[list(slots)]]

    def running(self, context):
        return ToyBackend, "run"


KINDS = (Transformers(), LlamaCpp(), Toy())
EVERY_KIND = [
    pytest.param(
        kind,
        id=kind.name,
        marks=[] if kind.installed else pytest.mark.skip(reason=f"{kind.name} is not installed here"),
    )
    for kind in KINDS
]
