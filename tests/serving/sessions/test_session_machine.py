"""Random sequences of operations on a session, with restarts, against a plain list."""

from __future__ import annotations

from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from kveraser.serving.decoding import Sampling
from kveraser.serving.service import Service, ServiceOptions
from kveraser.serving.sessions import asking
from kveraser.serving.sessions.selection import Selection
from kveraser.serving.sessions.sessions import Sessions
from kveraser.serving.worker import Job


class Machine(RuleBasedStateMachine):
    """Random operations on one session, with restarts, against a plain list of what should be in it."""

    def __init__(self):
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.start()
        self.name = self.sessions.create("me").id
        self.pieces = []  # [text, span, id of its erase or None, purged]

    def start(self):
        model = text_model()
        options = ServiceOptions(state_dir=Path(self.folder.name) / "state", cache_budget=1 << 22)
        self.service = Service(model, make_tokenizer(), random_eraser(model), options)
        self.sessions = Sessions(self.service.store, self.service.limits)

    @property
    def context(self):
        return self.sessions.get("me", self.name).context

    @rule(text=st.sampled_from(["the code is 1234. ", "the car is blue. ", "it is fast. ", "çödé 🎈 "]))
    def append(self, text):
        span = self.sessions.append_text("me", self.name, text)
        self.pieces.append([text, span, None, False])

    @precondition(lambda self: any(piece[2] is None for piece in self.pieces))
    @rule(
        data=st.data(), method=st.sampled_from(["kveraser", "full-recompute", "delete-and-shift"]), purge=st.booleans()
    )
    def erase(self, data, method, purge):
        piece = data.draw(st.sampled_from([piece for piece in self.pieces if piece[2] is None]))
        receipt = self.sessions.erase("me", self.name, Selection(spans=(piece[1],)), method, purge=purge)
        piece[2:] = [receipt.id, purge]
        if purge:
            assert self.context.exact

    @precondition(lambda self: any(piece[2] and not piece[3] for piece in self.pieces))
    @rule(data=st.data())
    def restore(self, data):
        piece = data.draw(st.sampled_from([piece for piece in self.pieces if piece[2] and not piece[3]]))
        self.sessions.restore("me", self.name, piece[2])
        piece[2] = None

    @rule()
    def repair(self):
        self.sessions.repair("me", self.name, Job(lambda job: None, 60))
        assert self.context.exact

    @rule()
    def restart(self):
        self.service.close()
        self.start()

    @precondition(lambda self: any(piece[2] is None for piece in self.pieces))
    @rule()
    def ask(self):
        before = self.context.live_ids
        asking.ask(self.sessions, "me", self.name, "and?", Sampling(max_tokens=3), False, Job(lambda job: None, 60))
        assert self.context.live_ids == before

    @invariant()
    def the_text_is_what_it_should_be(self):
        assert self.context.text == "".join(piece[0] for piece in self.pieces if piece[2] is None)

    @invariant()
    def what_is_called_exact_equals_a_fresh_prefill(self):
        context = self.context
        if context.exact and context.live_ids:
            plain = kv.ErasableContext(context.model)
            plain.append_ids(context.live_ids)
            assert float((plain.logits([5]) - context.logits([5])).abs().max()) < 1e-3

    def teardown(self):
        self.service.close()
        self.folder.cleanup()


Machine.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)


TestMachine = Machine.TestCase
