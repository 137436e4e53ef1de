"""The scheduler's half of the connector: what it admits, and when it does not start. Needs vLLM, but no server."""

from __future__ import annotations

import importlib.util
import json
import threading
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM, which wants an environment of its own: run `make test-vllm`", allow_module_level=True)

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from kveraser.engines.vllm.protocol import KEY, Demand, Found, Look, Piece, Save
from kveraser.engines.vllm.server.connector import EraserConnector
from kveraser.engines.vllm.server.launch import shipped_folder
from kveraser.engines.vllm.server.layout import WorkerCache
from kveraser.errors import EraserMismatchError, OptionError, StoreError, UnsupportedCacheError
from kveraser.spans import Span

LAYERS, HEADS, WIDTH = 2, 3, 8


def full_attention(**changes):
    return FullAttentionSpec(block_size=32, num_kv_heads=HEADS, head_size=WIDTH, dtype=torch.float32, **changes)


def connect(folder, *, policy="fail", spec=None, options=None, cache_dtype="auto", draft=None, slots=2):
    shape = SimpleNamespace(model_type="tiny", num_hidden_layers=LAYERS, num_key_value_heads=HEADS)
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"store": str(folder)} if options is None else options,
            is_kv_producer=True,
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        model_config=SimpleNamespace(
            model="org/tiny",
            dtype=torch.float32,
            max_model_len=512,
            hf_text_config=shape,
            get_total_num_kv_heads=lambda: HEADS,
            get_head_size=lambda: WIDTH,
        ),
        parallel_config=SimpleNamespace(),
        speculative_config=draft,
        lora_config=SimpleNamespace(max_loras=slots),
    )
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec or full_attention())])
    return EraserConnector(config, KVConnectorRole.SCHEDULER, groups)


def ask(connector, ids, params, **changes):
    """A request as the scheduler sees it, after its arrival."""
    request = SimpleNamespace(
        request_id=f"request-{len(connector.scheduler._admitted)}",
        prompt_token_ids=list(ids),
        kv_transfer_params=params.params() if isinstance(params, Demand) else params,
        num_tokens=len(ids),
        cache_salt="theirs",
        block_hashes=["hash of the first block"],
        lora_request=None,
        skip_reading_prefix_cache=False,
        get_finished_reason=lambda: "stop",
    )
    vars(request).update(changes)
    request.update_block_hashes = lambda: request.block_hashes.append(f"under {request.cache_salt}")
    connector.on_new_request(request)
    return request


def finish(connector, request):
    _, said = connector.request_finished(request, [])
    return said and said[KEY]


def make_edit(connector, ids):
    """An edited context that stands for `ids`, made of states that were written before."""
    store = connector.scheduler._store
    name = store.new_id()
    states = torch.randn(LAYERS, len(ids), HEADS, WIDTH)
    store.write(name, 0, 0, states, states.clone())
    store.seal(name, len(ids))
    request = ask(connector, [*ids, 5], Demand(compose=(Piece(name, 0, len(ids)),)))
    return finish(connector, request)["edit"]


IDS = list(range(100, 200))


def test_a_plain_request_is_left_alone(tmp_path):
    connector = connect(tmp_path)
    for params in (None, {"do_remote_prefill": True}):
        request = ask(connector, IDS, params)
        assert (request.cache_salt, request.block_hashes) == ("theirs", ["hash of the first block"])
        assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
        assert finish(connector, request) is None


def test_an_edit_is_loaded_under_its_own_salt(tmp_path):
    connector = connect(tmp_path)
    edit = make_edit(connector, IDS)
    request = ask(connector, [*IDS, 1, 2], Demand(edit=edit["id"]))
    assert (request.cache_salt, request.block_hashes) == (edit["salt"], [f"under {edit['salt']}"])
    assert connector.get_num_new_matched_tokens(request, 0) == (100, False)
    assert connector.get_num_new_matched_tokens(request, 96) == (4, False)
    request = ask(connector, IDS, Demand(edit=edit["id"]))  # no new text: the last token runs again
    assert connector.get_num_new_matched_tokens(request, 0) == (99, False)


@pytest.mark.parametrize(
    ("ids", "changes"),
    [
        ([*IDS[:50], 7, *IDS[51:], 1], {}),
        (IDS[:99], {}),
        ([1, *IDS], {}),
        ([*IDS, 1], {"lora_request": "adapter"}),
        ([*IDS, 1], {"skip_reading_prefix_cache": True}),
    ],
    ids=["another id", "too short", "shifted", "with an adapter", "with logprobs of the prompt"],
)
def test_an_edit_is_refused_for_what_it_was_not_made_for(tmp_path, ids, changes):
    connector = connect(tmp_path)
    edit = make_edit(connector, IDS)
    request = ask(connector, ids, Demand(edit=edit["id"]), **changes)
    assert connector.scheduler._admitted[request.request_id].refused
    # It finds no block of another request, and claims states that the workers will then report as failed.
    assert request.cache_salt not in ("theirs", edit["salt"])
    assert request.block_hashes == [f"under {request.cache_salt}"]
    assert not request.skip_reading_prefix_cache
    assert connector.get_num_new_matched_tokens(request, 0) == (len(ids) - 1, False)
    assert "error" in finish(connector, request)


@pytest.mark.parametrize(
    "params",
    [
        Demand(edit="0" * 32),
        Demand(load=(Piece("0" * 32, 0, 5),)),
        Demand(save=(Save(0, 500),)),
        {KEY: {"edit": "../x"}},
        {KEY: 5},
    ],
    ids=["no such edit", "no such entry", "beyond the prompt", "a path", "nonsense"],
)
def test_what_cannot_be_done_is_refused_and_the_engine_goes_on(tmp_path, params):
    connector = connect(tmp_path)
    request = ask(connector, IDS, params)
    assert connector.scheduler._admitted[request.request_id].refused
    assert "error" in finish(connector, request)
    assert connector.scheduler._admitted == {}


def test_an_edited_context_whose_request_fails_is_dropped(tmp_path):
    connector = connect(tmp_path)
    edit = make_edit(connector, IDS)
    demand = Demand(compose=(Piece(edit["id"], 0, 50),))
    request = ask(connector, IDS, demand, get_finished_reason=lambda: "error")
    finish(connector, request)
    assert connector.scheduler._store.ids().count(edit["id"]) == 1
    assert len(connector.scheduler._store.ids()) == 2  # the edit, and the states it was made of


def test_states_that_the_workers_have_not_written_are_no_entry(tmp_path):
    connector = connect(tmp_path)
    request = ask(connector, IDS, Demand(save=(Save(0, 50),)))
    connector.scheduler._admitted[request.request_id].written = True
    assert "not written by all workers" in finish(connector, request)["error"]
    assert connector.scheduler._store.ids() == []


def test_what_does_not_fit_into_the_store_is_refused(tmp_path):
    connector = connect(tmp_path, options={"store": str(tmp_path), "capacity_gb": 1e-5})
    request = ask(connector, IDS, Demand(save=(Save(0, 100),)))
    assert "capacity_gb" in finish(connector, request)["error"]


HIDDEN = ("a" * 32, "b" * 32)
LOOK = Look((Piece("0" * 32, 0, 100),), (Span(10, 20),), (), 64)


class Slow:
    """Looks when it is told to."""

    def __init__(self):
        self.go, self.error = threading.Event(), None

    def look(self, look, client):
        assert self.go.wait(10)
        if self.error:
            raise self.error
        return Found((Span(20, 36),), 0.5, (), HIDDEN)


def looking(folder):
    connector = connect(folder)
    connector.scheduler._looking = Slow()
    return connector, connector.scheduler._looking


def some_entry(store, name=None):
    name = name or store.new_id()
    states = torch.randn(LAYERS, 5, HEADS, WIDTH)
    store.write(name, 0, 0, states, states.clone())
    store.seal(name, 5)
    return name


def test_a_look_is_waited_for_beside_other_requests_and_then_answered(tmp_path):
    connector, slow = looking(tmp_path)
    span = some_entry(connector.scheduler._store)
    request = ask(connector, [0], Demand(look=LOOK, drop=(span,)))
    plain = ask(connector, IDS, None)
    for _ in range(3):
        assert connector.get_num_new_matched_tokens(request, 0) == (None, False)
        assert connector.get_num_new_matched_tokens(plain, 0) == (0, False)
    assert connector.scheduler._store.ids() == [span]  # it is being looked at
    slow.go.set()
    while connector.get_num_new_matched_tokens(request, 0)[0] is None:
        pass
    said = finish(connector, request)["found"]
    assert Found.read(said) == Found((Span(20, 36),), 0.5, (), HIDDEN)
    assert connector.scheduler._store.ids() == []


def test_a_look_that_fails_says_why_and_drops_what_was_to_be_dropped(tmp_path):
    connector, slow = looking(tmp_path)
    span = some_entry(connector.scheduler._store)
    slow.error = StoreError("it is damaged")
    slow.go.set()
    request = ask(connector, [0], Demand(look=LOOK, drop=(span,)))
    while connector.get_num_new_matched_tokens(request, 0)[0] is None:
        pass
    assert finish(connector, request) == {"error": "it is damaged"}
    assert connector.scheduler._store.ids() == []


def test_what_a_look_made_is_dropped_when_nobody_waits_for_it_any_more(tmp_path):
    connector, slow = looking(tmp_path)
    store = connector.scheduler._store
    for name in HIDDEN:
        some_entry(store, name)
    request = ask(connector, [0], Demand(look=LOOK))
    assert connector.get_num_new_matched_tokens(request, 0) == (None, False)
    assert finish(connector, request) == {}
    slow.go.set()
    connector.scheduler._beside.shutdown()
    assert store.ids() == []


def test_without_an_eraser_nobody_looks(tmp_path):
    request = ask(connector := connect(tmp_path), [0], Demand(look=LOOK))
    assert "without an eraser" in finish(connector, request)["error"]


def observed(connector, **changes):
    connector.scheduler._looking = SimpleNamespace(of_queries=2)
    connector.scheduler._about["learns"] = True
    return ask(connector, IDS, Demand(save=(Save(0, 100),), observe=True, **changes))


def test_queries_are_kept_of_a_request_that_is_computed_whole_and_calibrating_is_tried_once(tmp_path):
    connector = connect(tmp_path)
    request = observed(connector)
    assert request.cache_salt != "theirs"
    assert connector.scheduler._about["learns"] is False
    admitted = connector.scheduler._admitted[request.request_id]
    for name in (*admitted.saves, *admitted.queries):
        states = torch.randn(LAYERS, 100, HEADS, WIDTH)
        connector.scheduler._store.write(name, 0, 0, states, states.clone())
    admitted.written = True
    assert finish(connector, request)["saved"] == [*admitted.saves, *admitted.queries]


def test_queries_that_were_not_written_whole_are_no_entries_and_leave_none(tmp_path):
    connector = connect(tmp_path)
    request = observed(connector)
    admitted = connector.scheduler._admitted[request.request_id]
    states = torch.randn(LAYERS, 100, HEADS, WIDTH)
    connector.scheduler._store.write(admitted.saves[0], 0, 0, states, states.clone())
    admitted.written = True
    assert "not written by all workers" in finish(connector, request)["error"]
    assert connector.scheduler._store.ids() == []


def test_a_worker_hears_queries_and_leaves_the_layers_as_they_were():
    class Impl:
        def forward(self, layer, query, key):
            return query + key

    cache = object.__new__(WorkerCache)
    cache._modules, cache.block_size = [SimpleNamespace(impl=Impl()) for _ in range(2)], 32
    heard = cache.listen()
    query = torch.randn(5, 3, 4)
    assert torch.equal(cache._modules[1].impl.forward(None, query, 1), query + 1)
    cache.stop_listening()
    assert torch.equal(cache._modules[0].impl.forward(None, query, 1), query + 1)
    assert heard[0] == []
    assert torch.equal(heard[1][0], query)
    rows, positions = cache.positions_of(torch.tensor([70, 71, -1, 10, 64, 3]), (2, 0), 40)
    assert (rows.tolist(), positions.tolist()) == ([0, 1, 4, 5], [6, 7, 0, 35])


def test_loads_share_blocks_under_an_id_and_never_with_an_edit_of_that_salt(tmp_path):
    connector = connect(tmp_path)
    name = some_entry(connector.scheduler._store)
    salts = [
        ask(connector, IDS, Demand(load=(Piece(name, 0, 5),), under=under)).cache_salt
        for under in ("c" * 32,) * 2 + (None,)
    ]
    assert salts[0] == salts[1] != salts[2]
    assert "c" * 32 not in salts  # as it would be if it were an edit's


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"policy": "recompute"}, OptionError, "kv_load_failure_policy"),
        ({"options": {}}, OptionError, "store"),
        ({"cache_dtype": "fp8"}, UnsupportedCacheError, "quantised"),
        ({"slots": 1}, OptionError, "--max-loras 2"),
        ({"draft": object()}, UnsupportedCacheError, "draft"),
        ({"spec": full_attention(sliding_window=64)}, UnsupportedCacheError, "sliding"),
        (
            {
                "spec": SlidingWindowSpec(
                    block_size=32, num_kv_heads=3, head_size=8, dtype=torch.float32, sliding_window=64
                )
            },
            UnsupportedCacheError,
            "SlidingWindowSpec",
        ),
    ],
)
def test_it_does_not_start_where_it_could_not_keep_its_promises(tmp_path, changes, error, match):
    with pytest.raises(error, match=match):
        connect(tmp_path, **changes)


def test_it_does_not_start_with_an_eraser_of_another_model(tmp_path):
    options = {"store": str(tmp_path), "eraser": str(shipped_folder("smollm2-135m-instruct"))}
    with pytest.raises(EraserMismatchError, match="made for a model with"):
        connect(tmp_path, options=options)


@pytest.mark.parametrize(("key", "said"), [("acts_on", "readers"), ("values", "learned")])
def test_it_does_not_start_with_an_eraser_that_is_more_than_a_lora_on_erased_tokens(tmp_path, key, said):
    config = json.loads((shipped_folder("smollm2-135m-instruct") / "kveraser.json").read_text(encoding="utf-8"))
    (tmp_path / "kveraser.json").write_text(json.dumps({**config, "format": 4, key: said}), encoding="utf-8")
    with pytest.raises(EraserMismatchError, match=f"{key}={said}, which works in transformers only"):
        connect(tmp_path, options={"store": str(tmp_path / "store"), "eraser": str(tmp_path)})
