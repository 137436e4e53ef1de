"""Erasing on a real vLLM server with the embedded model and the eraser that ships: one process, and tensor parallel 3.

Run by `make test-vllm` in an environment of its own. Everything is in float32, where vLLM and transformers agree; in
bfloat16 both flip tokens by rounding, edited or not.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache

import pytest
import torch
from serving_helpers import running_app

import kveraser as kv
from kveraser.demo.stories import Story, pages, stories
from kveraser.engines.vllm.client.http import VLLMClient
from kveraser.engines.vllm.client.session import VLLMSession
from kveraser.engines.vllm.protocol import Demand, Piece
from kveraser.engines.vllm.proxy.app import ProxyAppOptions, create_proxy
from kveraser.engines.vllm.proxy.comparing import compare
from kveraser.engines.vllm.proxy.front import Front, ProxyOptions
from kveraser.engines.vllm.server.launch import running_server, server_arguments, shipped_folder
from kveraser.eraser import shipped_eraser
from kveraser.errors import EngineError
from kveraser.files import cache_folder
from kveraser.model.backbone import DEFAULT_BACKBONE, converted_folder
from kveraser.serving.contexts.finding import message_starts

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="needs vLLM, which wants an environment of its own: run `make test-vllm`",
    ),
]

TOKENS = 10
BLOCKS = 42  # few, so that requests are preempted and blocks evicted; 40 are needed for one request of full length
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for emptying the prefix cache
}
SETTINGS = [
    "--dtype", "float32", "--max-model-len", "1280", "--max-num-seqs", "4", "--block-size", "32", "--enforce-eager",
    "--num-gpu-blocks-override", str(BLOCKS),
]  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A context in three parts, the middle one to be erased, and a question."""

    parts: tuple[str, str, str]
    question: str

    @classmethod
    def of(cls, story: Story, more: int) -> Example:
        """A story with `more` pages of text before it."""
        text = "\n\n".join(page for page in pages()[:more] if len(page) > 100)
        return cls((f"{text}\n\n{story.prefix}", story.span, story.suffix), f"\nQuestion: {story.question}\nAnswer:")


EXAMPLES = [Example.of(story, more) for more in (0, 2, 3, 5, 7) for story in stories()]


@lru_cache(maxsize=1)
def backbone():
    torch.set_num_threads(1)
    return kv.load_backbone(dtype="fp32")


TRAINED = {"eraser": "eraser", "choose": "next"}


def as_the_engine(model, trained=False):
    """Erasing as the engine does it: the span hidden and readers recomputed in runs; or steered, and the next tokens recomputed."""
    if trained:
        return kv.Steering(shipped_eraser(model), repair=32, choose="next")
    return kv.Steering(block=16, keys=None)


@cache
def expected(number: int, edited: bool, tokens: int = TOKENS, trained: bool = False) -> tuple[list[int], list[float]]:
    """What transformers says on an example, with the span erased or left in, and the log-probability of each token."""
    example = EXAMPLES[number]
    context = kv.ErasableContext(*backbone())
    spans = [context.append(part) for part in example.parts]
    if edited:
        context.erase(spans[1], as_the_engine(context.model, trained))
    question = context.encode(example.question)
    ids = context.generate_ids(question, max_new_tokens=tokens)
    logits = context.logits_ids([*question, *ids])[len(question) - 1 : -1]
    return ids, logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].tolist()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module", params=[1, 3], ids=["one process", "tensor parallel 3"])
def workers(request):
    """How many processes the model is split over."""
    return request.param


@pytest.fixture(scope="module")
def server(workers, store, tmp_path_factory):
    """A running server; gives its address."""
    folder = cache_folder()  # the tests' own autouse fixture would hide the converted model
    assert (converted_folder(DEFAULT_BACKBONE)).is_relative_to(folder)
    arguments = server_arguments(
        DEFAULT_BACKBONE, shipped_folder(DEFAULT_BACKBONE), store, capacity_gb=2,
        extra=[*SETTINGS, "--tensor-parallel-size", str(workers)],
    )  # fmt: skip
    with running_server(arguments, log=tmp_path_factory.mktemp("log") / "server.log", **ENVIRONMENT) as address:
        yield address


@pytest.fixture
def one_process(workers):
    """For tests of what does not depend on the number of processes."""
    if workers != 1:
        pytest.skip("tested with one process")


def read(server, number, **options) -> tuple[VLLMSession, kv.Span]:
    """A session that holds an example, and its span."""
    session = VLLMSession(server, **options)
    spans = [session.append(part) for part in EXAMPLES[number].parts]
    return session, spans[1]


def erased(server, number, **options) -> VLLMSession:
    session, span = read(server, number, **options)
    session.erase(span)
    return session


def says(session, number, edited, tokens=TOKENS, trained=False):
    """The session answers an example's question as transformers does; returns the largest log-probability difference."""
    done = session.complete(EXAMPLES[number].question, max_new_tokens=tokens, logprobs=0)
    ids, logprobs = expected(number, edited, tokens, trained)
    assert done.ids == ids
    difference = max(abs(a - b) for a, b in zip(done.logprobs, logprobs, strict=True))
    assert difference < 1e-3
    return difference


def empty_prefix_cache(server):
    urllib.request.urlopen(urllib.request.Request(f"{server}/reset_prefix_cache", b"", method="POST")).close()


def preemptions(server) -> float:
    text = urllib.request.urlopen(f"{server}/metrics").read().decode()
    return sum(float(value) for value in re.findall(r"^vllm:num_preemptions_total\S* (\S+)", text, re.MULTILINE))


def test_twenty_edited_contexts_give_transformers_tokens(server, workers):
    differences = []
    for number in range(20):
        session = erased(server, number)
        differences.append(says(session, number, edited=True))
        session.close()
    changed = sum(expected(number, True)[0] != expected(number, False)[0] for number in range(4))
    print(f"\n{workers} worker(s): largest log-probability difference {max(differences):.1e}; {changed} of 4 answers "
          "differ from those with the span left in")  # fmt: skip
    assert changed >= 2


def test_a_steered_span_and_the_next_tokens_give_transformers_tokens(server):
    for number in range(1, 20, 4):
        session = erased(server, number, **TRAINED)
        says(session, number, edited=True, trained=True)
        session.close()


def test_readers_behind_a_steered_span_give_transformers_tokens(server, one_process):
    context, session = kv.ErasableContext(*backbone()), VLLMSession(server, eraser="eraser", choose="readers")
    spans = [(session.append(part), context.append(part))[1] for part in EXAMPLES[8].parts]
    mine = session.erase(spans[1])
    theirs = context.erase(spans[1], kv.Steering(shipped_eraser(context.model), choose="readers", block=16, keys=None))
    assert mine.recomputed == theirs.recomputed
    question = context.encode(EXAMPLES[8].question)
    assert session.complete(question, max_new_tokens=TOKENS).ids == context.generate_ids(
        question, max_new_tokens=TOKENS
    )


def test_the_readers_are_those_of_transformers_and_later_runs_find_the_blocks_of_earlier_ones(server):
    number = 12
    context, (session, span) = kv.ErasableContext(*backbone()), read(server, number)
    for part in EXAMPLES[number].parts:
        context.append(part)
    cached, complete = [], session._client.complete

    def completed(*asked, demand=None, **options):
        done = complete(*asked, demand=demand, **options)
        if demand is not None and demand.under:
            cached.append(done.cached or 0)
        return done

    session._client.complete = completed
    mine, theirs = session.erase(span, undo=False), context.erase(span, as_the_engine(context.model))
    assert mine.recomputed == theirs.recomputed
    assert mine.residual == pytest.approx(theirs.residual, abs=1e-3)
    assert len(cached) == len(mine.recomputed) > 1
    assert all(count >= run.end // 32 * 32 for run, count in zip(mine.recomputed, cached[1:], strict=False))


def test_unedited_contexts_give_transformers_tokens(server, one_process):
    for number in range(0, 20, 5):
        says(read(server, number)[0], number, edited=False)


def test_several_spans_and_a_second_erase_give_transformers_tokens(server):
    story = stories()[0]
    parts = [*(f"{page}\n\n" for page in pages()[3:15] if len(page) > 100), story.prefix, story.span, story.suffix]
    tokenizer = backbone()[1]
    context, session = kv.ErasableContext(*backbone()), VLLMSession(server, tokenizer=tokenizer)
    spans = [context.append(part) for part in parts]
    assert [session.append(part) for part in parts] == spans
    for what in ([spans[1], spans[-2]], spans[2]):
        context.erase(what, as_the_engine(context.model))
        session.erase(what)
        question = f"\nQuestion: {story.question}\nAnswer:"
        mine = session.complete(question, max_new_tokens=TOKENS)
        assert mine.ids == context.generate_ids(context.encode(question), max_new_tokens=TOKENS)
        assert session.append(" Noted.\n") == context.append(" Noted.\n")


@pytest.mark.parametrize("first", ["plain", "edited"])
def test_edited_and_plain_requests_with_the_same_text_do_not_meet_in_the_prefix_cache(server, one_process, first):
    number = 0
    empty_prefix_cache(server)
    plain, _ = read(server, number)
    edited = None
    if first == "plain":
        says(plain, number, edited=False)
    for _ in range(2):
        edited = edited or erased(server, number)
        says(edited, number, edited=True)
        says(plain, number, edited=False)
    empty_prefix_cache(server)
    if first == "edited":
        says(edited, number, edited=True)
    says(plain, number, edited=False)
    says(edited, number, edited=True)


def test_two_edits_of_the_same_text_share_no_blocks(server, one_process):
    first, second = erased(server, 0), erased(server, 0)
    assert first._state.edit != second._state.edit
    says(first, 0, edited=True)
    says(second, 0, edited=True)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_an_edit_is_not_served_for_the_ids_it_erased(server, one_process, cached):
    session, _ = read(server, 0)
    ids = list(session._state.ids)
    says(session, 0, edited=False)
    session = erased(server, 0)
    if not cached:
        empty_prefix_cache(server)
    edit = session._state.edit
    for salt in (edit.salt, None, "another"):
        with pytest.raises(EngineError, match="500"):
            session._client.complete(session.model, ids, max_tokens=4, demand=Demand(edit=edit.id), salt=salt)
    says(session, 0, edited=True)


def test_an_edit_gives_no_logprobs_of_its_prompt(server, one_process):
    session = erased(server, 0)
    with pytest.raises(EngineError, match="500"):
        session.complete(EXAMPLES[0].question, max_new_tokens=2, prompt_logprobs=1)
    says(session, 0, edited=True)


def test_whatever_salt_a_request_comes_with_an_edit_is_served_under_its_own(server, one_process):
    session = erased(server, 0)
    prompt = [*session._state.ids, *session._encode(EXAMPLES[0].question)]
    for salt in (None, "another"):
        done = session._client.complete(
            session.model, prompt, max_tokens=TOKENS, demand=Demand(edit=session._state.edit.id), salt=salt
        )
        assert done.ids == expected(0, True)[0]


def test_the_spans_own_states_are_in_no_entry(server, store, one_process):
    session, span = read(server, 0)
    before = set(store.iterdir())
    session.erase(span)
    (entry,) = set(store.iterdir()) - before
    assert entry.name == session._state.edit.id


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not cached"])
def test_a_missing_entry_ends_the_request_with_an_error(server, store, one_process, cached):
    session = erased(server, 0)
    shutil.rmtree(store / session._state.edit.id)
    if not cached:
        empty_prefix_cache(server)
    for _ in range(2):
        with pytest.raises(EngineError, match="500"):
            session.generate(EXAMPLES[0].question)
    says(read(server, 0)[0], 0, edited=False)


def test_a_corrupt_entry_ends_the_request_with_an_error_and_leaves_nothing_in_the_prefix_cache(
    server, store, one_process
):
    session, other = erased(server, 0), erased(server, 0)
    file = next((store / session._state.edit.id).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    empty_prefix_cache(server)
    for _ in range(3):
        with pytest.raises(EngineError, match="500"):
            session.generate(EXAMPLES[0].question)
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    says(session, 0, edited=True)
    says(other, 0, edited=True)


@pytest.mark.parametrize(
    "demand",
    [
        Demand(edit="0" * 32),
        Demand(load=(Piece("0" * 32, 0, 5),)),
        Demand(compose=(Piece("0" * 32, 0, 5),)),
        Demand(edit="../../../etc/passwd"),
    ],
    ids=["edit", "load", "compose", "path"],
)
def test_what_is_not_in_the_store_is_an_error(server, one_process, demand):
    client = VLLMClient(server)
    with pytest.raises(EngineError, match="500"):
        client.complete(DEFAULT_BACKBONE, list(range(50, 150)), max_tokens=4, demand=demand)


def test_two_sessions_at_the_same_time_do_not_mix(server, one_process):
    def work(number: int) -> None:
        for _ in range(2):
            session, span = read(server, number)
            says(session, number, edited=False)
            session.erase(span)
            says(session, number, edited=True)
            session.append(" Noted.")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 3)))


def test_a_plain_request_in_one_batch_with_the_erasers_adapter_is_left_alone(server, one_process):
    session, _ = read(server, 0)
    alone = session.complete("", max_new_tokens=60, ignore_eos=True, logprobs=0)

    def erase_again_and_again() -> None:
        for _ in range(3):
            erased(server, 0)

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(erase_again_and_again)
        while not busy.done():
            beside = session.complete("", max_new_tokens=60, ignore_eos=True, logprobs=0)
            assert beside.ids == alone.ids
            assert max(abs(a - b) for a, b in zip(beside.logprobs, alone.logprobs, strict=True)) < 1e-3
        busy.result()


def test_a_preempted_edited_request_goes_on_from_the_edited_context(server, one_process):
    tokens = 220
    sessions = [erased(server, number) for number in (0, 1, 2)]
    questions = [EXAMPLES[number].question for number in (0, 1, 2)]

    def long(session, question):
        return session.complete(question, max_new_tokens=tokens, ignore_eos=True, logprobs=0)

    alone = [long(session, question) for session, question in zip(sessions, questions, strict=True)]
    before = preemptions(server)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(long, sessions, questions))
    assert preemptions(server) > before
    for mine, reference in zip(together, alone, strict=True):
        assert mine.ids == reference.ids
        assert max(abs(a - b) for a, b in zip(mine.logprobs, reference.logprobs, strict=True)) < 1e-2


def test_an_edit_is_served_again_after_its_blocks_were_evicted(server, one_process):
    session = erased(server, 0)
    empty_prefix_cache(server)
    says(session, 0, edited=True)
    assert session.complete(EXAMPLES[0].question, max_new_tokens=1).cached


def test_a_chat_goes_on_after_an_erase_and_an_erase_can_be_undone(server, one_process):
    context, session = kv.ErasableContext(*backbone()), VLLMSession(server)
    for ctx in (context, session):
        ctx.append_message("user", "Which code opens the gate of the garden?")
        ctx.append_message("tool", "The code of the garden gate is 7391.", id="old")
        ctx.append_message("tool", "The code was changed today. The code of the garden gate is 2480.")
    context.erase("old", as_the_engine(context.model))
    receipt = session.erase("old")
    for question in ("Tell me the code.", "And what does it open?"):
        assert session.chat(question, max_new_tokens=TOKENS) == context.generate(
            question, max_new_tokens=TOKENS, keep=True
        )
    assert session.text == context.text
    session.restore(receipt)
    assert "7391" in session.text
    fresh = kv.ErasableContext(*backbone())
    fresh.append(list(session._state.ids))
    ids = fresh.encode("The code")
    assert session.complete(ids, max_new_tokens=TOKENS).ids == fresh.generate_ids(ids, max_new_tokens=TOKENS)


def test_the_openai_client_can_ask_an_edited_context(server, one_process):
    openai = pytest.importorskip("openai")
    session = erased(server, 0)
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    said = client.completions.create(
        model=session.model, max_tokens=TOKENS, temperature=0, **session.request(EXAMPLES[0].question)
    )
    assert said.choices[0].text == backbone()[1].decode(expected(0, True)[0], skip_special_tokens=True)


_kept: list[VLLMSession] = []


def test_an_edit_made_by_one_process_is_served_by_three(server, workers):
    if workers == 1:
        _kept.append(erased(server, 4))
        return
    if not _kept:
        pytest.skip("needs the run with one process before it")
    (session,) = _kept
    session._client = VLLMClient(server)
    says(session, 4, edited=True)


def test_a_client_that_drops_a_message_through_the_proxy_gets_transformers_edited_answer_and_others_the_plain_one(
    server,
):
    openai = pytest.importorskip("openai")
    tokenizer = backbone()[1]

    def ids_of(talk):
        return tokenizer.encode(
            tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        )

    story, page = stories()[0], "\n\n".join(page for page in pages()[:3] if len(page) > 100)
    talk = [{"role": "user", "content": text} for text in (story.prefix, story.span, page, story.question)]
    shorter = [
        talk[0],
        *talk[2:],
        {"role": "assistant", "content": "Let me see."},
        {"role": "user", "content": "Well?"},
    ]
    before, after = ids_of(talk), ids_of(shorter)
    found = compare(before, after, message_starts(tokenizer))
    edited, plain = kv.ErasableContext(*backbone()), kv.ErasableContext(*backbone())
    edited.append(before)
    edited.erase([kv.Span(start, end) for start, end in found.removals], as_the_engine(edited.model))
    expected = [
        tokenizer.decode(context.generate_ids(ids, max_new_tokens=TOKENS), skip_special_tokens=True)
        for context, ids in ((edited, after[found.new_from :]), (plain, after))
    ]
    front = Front([server], ProxyOptions(min_saved=0))
    with running_app(create_proxy(front, ProxyAppOptions(api_keys=("alpha", "beta")))) as address:
        while not front.replicas.all[0].max_tokens:
            time.sleep(0.1)

        def ask(key, talk):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
            reply = client.chat.completions.create(
                model=DEFAULT_BACKBONE, messages=talk, max_tokens=TOKENS, temperature=0
            )
            return reply.choices[0].message.content, (reply.model_extra.get("kveraser") or {}).get("method")

        ask("alpha", talk)
        assert ask("alpha", shorter) == (expected[0], "kveraser")
        assert ask("beta", shorter) == (expected[1], None)
        assert ask("alpha", shorter) == (expected[0], "prefix")
