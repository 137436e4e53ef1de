"""Time and going away end every change of a session, in the middle of a pass, and nothing is changed then."""

from __future__ import annotations

import pytest
from serving_helpers import PARTS

from conftest import same, states
from kveraser.errors import JobCancelledError, JobTimeoutError
from kveraser.serving.sessions.selection import Selection
from kveraser.serving.sessions.sessions import Sessions
from kveraser.serving.sessions.showing import show
from kveraser.serving.stopping import stoppable
from kveraser.serving.worker import Job


class Leaving(Job):
    """A job that is cancelled at its n-th check."""

    def __init__(self, checks):
        super().__init__(lambda job: None, 60)
        self.left = checks

    def check(self):
        self.left -= 1
        if self.left == 0:
            self.cancel()
        super().check()


CHANGES = {
    "text": lambda s, name: s.append_text("me", name, "and the door is fast " * 20),
    "message": lambda s, name: s.append_message("me", name, "user", "and the door is fast " * 20, None),
    "recompute": lambda s, name: s.erase("me", name, Selection(text=PARTS[2]), "full-recompute"),
    "purge": lambda s, name: s.erase("me", name, Selection(text=PARTS[2]), "kveraser", purge=True),
    "restore": lambda s, name: s.restore("me", name, s.get("me", name).context.receipts[0].id),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("checks", [1, 2, 9, 17])
def test_a_change_that_nobody_waits_for_stops_in_a_pass_and_is_not_made(make_service, tmp_path, change, checks):
    service = make_service(state_dir=tmp_path)
    sessions = Sessions(service.store, service.limits)
    name = sessions.create("me").id
    for part in (*PARTS, "the door is blue"):
        sessions.append_text("me", name, part)
    sessions.erase("me", name, Selection(text=PARTS[1]), "delete-and-shift")
    before, shown = states(sessions.get("me", name).context.cache), show(sessions.get("me", name))
    job = Leaving(checks)
    with pytest.raises(JobCancelledError):
        stoppable(lambda job: CHANGES[change](sessions, name))(job)
    assert job.left == 0
    assert same(before, states(sessions.get("me", name).context.cache))
    assert show(sessions.get("me", name)) == shown
    CHANGES[change](sessions, name)  # and it can still be made
    assert show(sessions.get("me", name)) != shown


def test_a_change_that_takes_too_long_ends_when_its_time_is_over(make_service):
    service = make_service(timeout=0.001)
    sessions = Sessions(service.store, service.limits)
    name = sessions.create("me").id
    slow = Job(lambda job: None, -1)
    with pytest.raises(JobTimeoutError):
        stoppable(lambda job: sessions.append_text("me", name, "the code is 1234"))(slow)
    assert show(sessions.get("me", name))["tokens"] == 0
