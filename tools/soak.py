"""A server under load for a while: `make soak`, by hand.

Knows: the server's HTTP interface, what the library does when it is asked the same one after another. Does not know how the server
works.

Clients do whatever comes to their mind with sessions and conversations of their own, in memory for a quarter of what they need, while
the server is killed and stopped and started again in between. Every client has a twin of each session in this process, which does
the same alone. What must hold: every reply is the twin's; what was acknowledged is there after a kill, and what was not is there
as a whole or not at all; no status from 500 on but 503 while the server stops; keys and values within the budget, and the process's
memory within what it has when it is idle, the budget and a margin; nothing of what was purged in any file at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import kveraser as kv
from conftest import make_tokenizer, random_eraser, text_model
from files_helpers import readable_bytes
from kveraser.serving.contexts.limits import Limits

SESSIONS = 4
"""Of each client."""
LONGEST = 500
"""Tokens of a session, about; then it is deleted and another one begun."""
MARGIN = 128 << 20
"""What the process may take beside what it has when it has just started and the budget; requests, a pass's own memory, Python's."""
METHODS = (
    "kveraser",
    "kveraser:repair=8",
    "delete-and-shift",
    "full-recompute",
    "local-suffix-repair",
    "attention-guided-repair",
)
WORDS = "the code of the door is blue and fast, the car is 1234 and it is red, look it up in the list".split()


class UnknownError(Exception):
    """Whether something was done is not known: the connection broke, or the server was stopping."""


class WrongError(Exception):
    """Something that must not be."""


@dataclass
class Session:
    """A session of the server, and its twin."""

    at: str
    twin: kv.ErasableContext
    receipts: dict[tuple[kv.Span, ...], kv.EraseReceipt] = field(default_factory=dict)
    messages: int = 0


class Server:
    """`kveraser serve` in a process of its own, which is started again when it ends."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self.ready = threading.Event()
        self.idle = self.most_rss = self.most_growth = self.most_bytes = 0

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "kveraser", "serve", "--model", self.folder / "model", "--eraser", self.folder / "eraser",
                   "--dtype", "float32", "--port", self.port, "--state-dir", self.folder / "state", "--cache-budget", self.budget,
                   "--timeout", 120]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
        for _ in range(1200):
            if self.process.poll() is not None:
                raise WrongError(
                    f"the server ended with {self.process.returncode}: {(self.folder / 'log').read_text()[-2000:]}"
                )
            with suppress(httpx.TransportError):
                self.http.get("/healthz")
                break
            time.sleep(0.1)
        self.idle = psutil.Process(self.process.pid).memory_info().rss
        self.ready.set()

    def end(self, how: signal.Signals) -> None:
        """End it."""
        assert self.process is not None
        self.ready.clear()
        self.process.send_signal(how)
        self.process.wait(60)

    def look(self) -> None:
        """Measure its memory."""
        assert self.process is not None
        with suppress(psutil.Error, httpx.HTTPError):
            rss = psutil.Process(self.process.pid).memory_info().rss
            self.most_rss, self.most_growth = max(self.most_rss, rss), max(self.most_growth, rss - self.idle)
            text = self.http.get("/metrics").text
            line = next(line for line in text.splitlines() if line.startswith("kveraser_cache_bytes "))
            self.most_bytes = max(self.most_bytes, int(float(line.split()[1])))


class Client(threading.Thread):
    """Does something with one of its sessions, again and again, and the same with the twin."""

    def __init__(self, number: int, seed: int, server: Server, end: float) -> None:
        super().__init__(name=f"client {number}")
        self.number, self.server, self.ends = number, server, end
        self.chance = random.Random(f"{seed} {number}")
        self.http = httpx.Client(base_url=server.url, timeout=180)
        self.model, self.tokenizer = text_model(), make_tokenizer()
        self.eraser = random_eraser(self.model)
        self.sessions: list[Session] = []
        self.talk: list[dict[str, str]] = []
        self.done: Counter[str] = Counter()
        self.purged: list[str] = []
        self.count = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Go on until the time is over."""
        try:
            while time.monotonic() < self.ends:
                self.step()
        except BaseException as error:
            self.error = error

    def step(self) -> None:
        """One thing."""
        if len(self.sessions) < SESSIONS:
            self._begin()
            return
        session = self.chance.choice(self.sessions)
        if len(session.twin) > LONGEST:
            self._forget(session)
            return
        verbs = [self._message, self._message, self._text, self._ask, self._ask, self._keep, self._erase, self._erase, self._erase_and_purge,
                 self._purge, self._restore, self._repair, self._show, self._chat]  # fmt: skip
        self.chance.choice(verbs)(session)

    # -- asking the server ---------------------------------------------------------------------------------------

    def call(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """One request; its status and what it says."""
        self.server.ready.wait(120)
        try:
            reply = self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise UnknownError from error
        if reply.status_code == 503 and reply.json()["error"]["code"] == "stopping":
            raise UnknownError
        if reply.status_code == 429:
            time.sleep(0.2)
            return self.call(method, path, **options)
        if reply.status_code >= 500:
            raise WrongError(f"{method} {path}: {reply.status_code} {reply.text}")
        return reply.status_code, reply.json()

    def _change(self, name: str, session: Session, request: Callable[[], Any], twin: Callable[[Any], Any]) -> None:
        """The same here and there; where it is not known whether it was done there, it is looked up."""
        try:
            said = request()
        except UnknownError:
            self.done["unknown"] += 1
            if not self._is_twin(session):
                twin(None)
                self._compare(f"{name}, after it was not known", session)
            return
        twin(said)
        self.done[name] += 1

    def _ok(self, method: str, path: str, **options: Any) -> Any:
        status, said = self.call(method, path, **options)
        if status >= 400:
            raise WrongError(f"{method} {path} {options}: {status} {said}")
        return said

    def _again(self, method: str, path: str, **options: Any) -> Any:
        """What changes nothing can be asked again."""
        while True:
            with suppress(UnknownError):
                return self._ok(method, path, **options)

    def _equal(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise WrongError(f"{what}: the server says {found!r}, alone it is {expected!r}")

    # -- what is compared ----------------------------------------------------------------------------------------

    def _ledger(self, session: Session) -> Any:
        twin = session.twin
        runs = sorted([(span, "live") for span in twin.live_spans] + [(span, "erased") for span in twin.erased])
        return (
            [([span.start, span.end], state, twin.text_of(span)) for span, state in runs],
            twin.exact,
            len(twin.receipts),
        )

    def _shown(self, session: Session) -> Any:
        shown = self._again("GET", session.at)
        return [(run["span"], run["state"], run["text"]) for run in shown["runs"]], shown["exact"], len(shown["erases"])

    def _is_twin(self, session: Session) -> bool:
        return bool(self._shown(session) == self._ledger(session))

    def _compare(self, what: str, session: Session) -> None:
        self._equal(what, self._shown(session), self._ledger(session))

    # -- what a client does --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        with suppress(UnknownError):  # one more session that nobody knows
            at = f"/v1/sessions/{self._ok('POST', '/v1/sessions')['id']}"
            self.sessions.append(Session(at, kv.ErasableContext(self.model, self.tokenizer, self.eraser)))
            self.done["create"] += 1

    def _forget(self, session: Session) -> None:
        try:
            self._ok("DELETE", session.at)
        except UnknownError:
            while True:
                with suppress(UnknownError):
                    status, _ = self.call("DELETE", session.at)
                    break
            if status not in (200, 404):
                raise WrongError(f"a session that was deleted: {status}") from None
        self.sessions.remove(session)
        self.done["delete"] += 1

    def _sentence(self) -> str:
        """Some words, with one that is nowhere else."""
        self.count += 1
        words = self.chance.choices(WORDS, k=self.chance.randint(3, 14))
        return f"{' '.join(words)} x{self.number}y{self.count}z"

    def _message(self, session: Session) -> None:
        session.messages += 1
        content, name = self._sentence(), f"m-{session.messages}"
        body = {"role": "tool", "content": content, "id": name}
        self._change(
            "message", session, lambda: self._ok("POST", f"{session.at}/messages", json=body)["span"],
            lambda said: self._span(said, session.twin.append_message("tool", content, id=name)),
        )  # fmt: skip

    def _text(self, session: Session) -> None:
        if session.twin.messages:
            return
        text = f"{self._sentence()}. "
        self._change(
            "text", session, lambda: self._ok("POST", f"{session.at}/text", json={"text": text})["span"],
            lambda said: self._span(said, session.twin.append(text)),
        )  # fmt: skip

    def _span(self, said: Any, span: kv.Span) -> None:
        if said is not None:
            self._equal("span", said, [span.start, span.end])

    def _ask(self, session: Session) -> None:
        prompt, tokens = self._sentence(), self.chance.randint(1, 8)
        said = self._again("POST", f"{session.at}/generate", json={"prompt": prompt, "max_tokens": tokens})
        self._equal("answer", said["text"], session.twin.generate(prompt, max_new_tokens=tokens))
        self._equal("exact", said["kveraser"]["exact"], session.twin.exact)
        self.done["ask"] += 1

    def _keep(self, session: Session) -> None:
        prompt = self._sentence()

        def twin(said: Any) -> None:
            answer = session.twin.generate(prompt, max_new_tokens=4, keep=True)
            if said is not None:
                self._equal("kept answer", said["text"], answer)

        body = {"prompt": prompt, "max_tokens": 4, "keep": True}
        self._change("keep", session, lambda: self._ok("POST", f"{session.at}/generate", json=body), twin)

    def _erase(self, session: Session, purge: bool = False) -> None:
        live = [
            m
            for m, span in session.twin.messages
            if m.id and not any(span.overlaps(gone) for gone in session.twin.erased)
        ]
        if not live:
            return
        message, method = self.chance.choice(live), self.chance.choice(METHODS)

        def twin(said: Any) -> None:
            receipt = session.twin.erase(message.id, method)
            if said is not None:
                self._equal("erase", (said["spans"], said["tokens_recomputed"]),
                            ([[s.start, s.end] for s in receipt.spans], receipt.tokens_recomputed))  # fmt: skip
            if purge:
                session.twin.purge(receipt)
                session.receipts.clear()
                self.purged.append(message.content)
            else:
                session.receipts[receipt.spans] = receipt

        at = f"{session.at}/messages/{message.id}?method={method}&purge={'true' if purge else 'false'}"
        self._change("erase and purge" if purge else "erase", session, lambda: self._ok("DELETE", at), twin)

    def _erase_and_purge(self, session: Session) -> None:
        self._erase(session, purge=True)

    def _an_erase(self, session: Session) -> tuple[str, kv.EraseReceipt] | None:
        """One of the erases that stand, and what the server calls it."""
        if not session.twin.receipts:
            return None
        receipt = self.chance.choice(session.twin.receipts)
        spans = [[span.start, span.end] for span in receipt.spans]
        found = next(erase["id"] for erase in self._again("GET", session.at)["erases"] if erase["spans"] == spans)
        return found, receipt

    def _purge(self, session: Session) -> None:
        if (found := self._an_erase(session)) is None:
            return
        name, receipt = found
        secrets = [session.twin.text_of(span) for span in receipt.spans]

        def twin(_: Any) -> None:
            session.twin.purge(receipt)
            session.receipts.clear()
            self.purged.extend(secrets)

        self._change("purge", session, lambda: self._ok("POST", f"{session.at}/purge", json={"erase": name}), twin)

    def _restore(self, session: Session) -> None:
        if not session.twin.exact and len(session.twin.receipts) > 1:
            self._repair(session)  # else it depends on what undoes them being in memory still, which states come back
        if (found := self._an_erase(session)) is None:
            return
        name, receipt = found

        def twin(said: Any) -> None:
            session.receipts.pop(receipt.spans, None)
            if receipt.undo is not None and (said is None or not said["bit_exact"]):
                receipt.undo.clear()  # as the server has let go of what undoes it
            report = session.twin.restore(receipt)
            if said is not None:
                self._equal("restore", (said["bit_exact"], said["exact"]), (report.bit_exact, report.exact))

        self._change("restore", session, lambda: self._ok("POST", f"{session.at}/restore", json={"erase": name}), twin)

    def _repair(self, session: Session) -> None:
        def twin(_: Any) -> None:
            session.twin.repair()
            session.receipts.clear()

        self._change("repair", session, lambda: self._ok("POST", f"{session.at}/repair"), twin)

    def _show(self, session: Session) -> None:
        self._compare("session", session)
        self.done["show"] += 1

    def _chat(self, _: Session) -> None:
        """A turn of a conversation that the server may have cached."""
        if len(self.talk) > 8:
            self.talk.clear()
        self.talk.append({"role": "user", "content": self._sentence()})
        body = {"model": str(self.server.folder / "model"), "messages": self.talk, "max_tokens": 4, "temperature": 0}
        said = self._again("POST", "/v1/chat/completions", json=body)["choices"][0]["message"]["content"]
        text = self.tokenizer.apply_chat_template(self.talk, tokenize=False, add_generation_prompt=True)
        alone = kv.ErasableContext(self.model, self.tokenizer, self.eraser)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self._equal("chat", said, alone.decode(alone.generate_ids(ids, max_new_tokens=4)))
        self.talk.append({"role": "assistant", "content": said or "nothing"})
        self.done["chat"] += 1


@contextmanager
def _folder(given: str | None) -> Iterator[Path]:
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="soak-") as made:
        yield Path(made)


def soak(minutes: float, clients: int, seed: int, restarts: int, folder: Path) -> dict[str, Any]:
    """Do it; what was seen.

    Raises:
        WrongError: something that must not be.
    """
    model, tokenizer = text_model(), make_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    random_eraser(model).save_pretrained(folder / "eraser")
    needed = Limits.of(model, tokenizer, 1).bytes_for(LONGEST) * SESSIONS * clients
    server = Server(folder, needed // 4)
    try:
        return _soak(server, minutes, clients, seed, restarts, needed)
    finally:
        if server.process is not None and server.process.poll() is None:
            server.end(signal.SIGKILL)


def _soak(server: Server, minutes: float, clients: int, seed: int, restarts: int, needed: int) -> dict[str, Any]:
    """`soak`, on a server that somebody else ends where this does not."""
    server.start()
    begun, chance = time.monotonic(), random.Random(seed)
    end = begun + 60 * minutes
    ends = sorted(begun + 60 * minutes * (n + chance.uniform(0.2, 0.8)) / restarts for n in range(restarts))
    threads = [Client(number, seed, server, end) for number in range(clients)]
    for thread in threads:
        thread.start()
    ended: Counter[str] = Counter()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.25)
        if any(thread.error for thread in threads):
            for thread in threads:
                thread.ends = 0.0
        if ends and time.monotonic() > ends[0]:
            ends.pop(0)
            how = signal.SIGKILL if sum(ended.values()) % 3 != 2 else signal.SIGTERM
            server.end(how)
            ended[how.name] += 1
            server.start()
        elif server.ready.is_set():
            server.look()
    for thread in threads:
        if thread.error is not None:
            raise WrongError(
                f"{thread.name}, after {sum(thread.done.values())} operations: {thread.error}"
            ) from thread.error
    server.end(signal.SIGTERM)
    files = [file for file in (server.folder / "state").rglob("*") if file.is_file()]
    left = readable_bytes(files)
    purged = [text for thread in threads for text in thread.purged]
    found = [text for text in purged if text.encode() in left]
    done: Counter[str] = sum((thread.done for thread in threads), Counter())
    seen = {"seconds": round(time.monotonic() - begun), "clients": clients, "seed": seed, "operations": sum(done.values()),
            "of each": dict(done.most_common()), "ended by": dict(ended), "needed": needed, "budget": server.budget,
            "most keys and values": server.most_bytes, "most RSS": server.most_rss, "most RSS beyond idle": server.most_growth,
            "purged": len(purged), "purged and found": len(found)}  # fmt: skip
    if found:
        raise WrongError(f"what was purged is in a file: {found[0]!r}; {seen}")
    if server.most_bytes > server.budget:
        raise WrongError(f"more keys and values than the budget: {seen}")
    if server.most_growth > server.budget + MARGIN:
        raise WrongError(f"more memory than the budget and a margin of {MARGIN}: {seen}")
    return seen


def main() -> None:
    """Read the options, do it, print what was seen as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=20, help="how often the server is killed or stopped meanwhile")
    parser.add_argument(
        "--folder", help="where models, state and the server's log go, and stay; default a temporary one"
    )
    options = parser.parse_args()
    with _folder(options.folder) as folder:
        try:
            seen = soak(options.minutes, options.clients, options.seed, options.restarts, folder)
        except WrongError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            sys.exit(1)
    print(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
