"""The store of states and edited contexts, and what requests may say: no vLLM needed."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kveraser.engines.vllm.protocol import KEY, Demand, Piece, Save, put, read_demand, take
from kveraser.engines.vllm.server.entries import CHUNK, Geometry, digest_ids
from kveraser.engines.vllm.server.store import EditStore
from kveraser.errors import EngineError, StoreError

GEOMETRY = Geometry("tiny", "float32", layers=4, kv_heads=6, head_dim=8)


def make_store(folder, capacity=2**30, geometry=GEOMETRY):
    return EditStore(folder, capacity, geometry)


def some_states(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (GEOMETRY.layers, tokens, GEOMETRY.kv_heads, GEOMETRY.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def keep(store, tokens, seed=0, stages=1, workers=1, client=None):
    """An entry written by several pipeline stages and tensor-parallel workers; returns its id and its states."""
    keys, values = some_states(tokens, seed)
    name = store.new_id()
    layers, heads = GEOMETRY.layers // stages, GEOMETRY.kv_heads // workers
    for stage in range(stages):
        for worker in range(workers):
            rows, columns = slice(stage * layers, (stage + 1) * layers), slice(worker * heads, (worker + 1) * heads)
            store.write(name, rows.start, columns.start, keys[rows, :, columns], values[rows, :, columns])
    store.seal(name, tokens, client)
    return name, keys, values


def read(store, name, start, end, layers=range(4), heads=range(6)):
    return store.read(store.entry(name), start, end, layers, heads)


def some_file(store, name):
    return next(file for file in sorted((store.folder / name).iterdir()) if file.suffix == ".safetensors")


@given(
    tokens=st.integers(1, 2 * CHUNK + 10),
    stages=st.sampled_from([1, 2]),
    workers=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
def test_states_read_back_the_same_however_they_were_split_into_workers(
    tmp_path_factory, tokens, stages, workers, data
):
    store = make_store(tmp_path_factory.mktemp("store"))
    name, keys, values = keep(store, tokens, stages=stages, workers=workers)
    start = data.draw(st.integers(0, tokens - 1))
    end = data.draw(st.integers(start + 1, tokens))
    layers = data.draw(st.sampled_from([range(4), range(1, 3)]))
    heads = data.draw(st.sampled_from([range(6), range(2, 4), range(5, 6)]))
    found = read(store, name, start, end, layers, heads)
    for mine, all_of_them in zip(found, (keys, values), strict=True):
        assert torch.equal(mine, all_of_them[layers.start : layers.stop, start:end, heads.start : heads.stop])


def test_an_edited_context_is_its_pieces_and_outlives_the_entries_it_was_made_of(tmp_path):
    store = make_store(tmp_path)
    first, keys, _ = keep(store, 400)
    second, other, _ = keep(store, 50, seed=1)
    pieces = [Piece(first, 0, 100), Piece(second, 0, 50), Piece(first, 150, 400)]
    edit = store.compose(pieces, digest_ids(range(400)))
    again = store.compose([Piece(edit.id, 0, 120), Piece(second, 20, 50)], digest_ids(range(150)))
    for name in (first, second, edit.id):
        store.drop(name)
    found, _ = read(store, again.id, 0, 150)
    assert torch.equal(found, torch.cat([keys[:, :100], other[:, :20], other[:, 20:50]], 1))
    assert store.ids() == [again.id]
    assert store.entry(again.id).salt != edit.salt


def test_an_edited_context_moves_keys_when_it_is_served_and_keeps_them_as_they_are(tmp_path):
    store = make_store(tmp_path)
    name, keys, _ = keep(store, 400)
    edit = store.compose([Piece(name, 0, 300, 7), Piece(name, 300, 400)], digest_ids(range(400)))
    assert store.entry(edit.id).pieces == (Piece(edit.id, 0, 300, 7), Piece(edit.id, 300, 400))
    again = store.compose(
        [Piece(edit.id, 0, 400, 3)], digest_ids(range(400))
    )  # from what was kept, not from what was moved
    assert store.entry(again.id).pieces == (Piece(again.id, 0, 400, 3),)
    for entry in (edit, again):
        assert torch.equal(read(store, entry.id, 0, 400)[0], keys)


def test_an_edited_context_without_moved_keys_is_written_as_ever(tmp_path):
    store = make_store(tmp_path)
    name, *_ = keep(store, 20)
    for move, version in ((0, 1), (5, 2)):
        edit = store.compose([Piece(name, 0, 20, move)], digest_ids(range(20)))
        assert json.loads((tmp_path / edit.id / "manifest.json").read_text())["format"] == version


def test_shared_files_take_their_room_once(tmp_path):
    store = make_store(tmp_path)
    name, _, _ = keep(store, 300)
    before = store.size()
    store.compose([Piece(name, 0, 300)], digest_ids(range(300)))
    assert store.size() - before < 2000  # a manifest


def test_what_the_workers_have_not_written_whole_is_not_sealed(tmp_path):
    store = make_store(tmp_path)
    keys, values = some_states(10)
    name = store.new_id()
    store.write(name, 0, 0, keys[:, :, :3], values[:, :, :3])
    with pytest.raises(StoreError, match="not written by all workers: 12 of 24"):
        store.seal(name, 10)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", [0, 200, -1])
def test_an_altered_file_is_an_error(tmp_path, place):
    store = make_store(tmp_path)
    name, _, _ = keep(store, 20)
    file = some_file(store, name)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match="checksum"):
        read(store, name, 0, 20)


def test_a_missing_or_truncated_file_is_an_error(tmp_path):
    store = make_store(tmp_path)
    name, _, _ = keep(store, 20)
    file = some_file(store, name)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StoreError, match="checksum"):
        read(store, name, 0, 20)
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        read(store, name, 0, 20)


def test_an_altered_manifest_is_an_error(tmp_path):
    store = make_store(tmp_path)
    name, _, _ = keep(store, 20)
    manifest = tmp_path / name / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokens": 20', '"tokens": 19'))
    with pytest.raises(StoreError, match="altered"):
        store.entry(name)
    manifest.write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        store.entry(name)
    manifest.unlink()
    with pytest.raises(StoreError, match="no entry"):
        store.entry(name)


def test_states_of_another_model_are_refused(tmp_path):
    name, _, _ = keep(make_store(tmp_path), 20)
    with pytest.raises(StoreError, match="another model"):
        make_store(tmp_path, geometry=replace(GEOMETRY, model="other")).entry(name)


def test_making_room_drops_what_was_used_longest_ago(tmp_path):
    size = 100 * GEOMETRY.bytes_per_token
    store = make_store(tmp_path, capacity=4 * size)
    names = [keep(store, 100, seed=seed)[0] for seed in range(3)]
    for age, name in zip((30, 10, 20), names, strict=True):
        file = tmp_path / name / "manifest.json"
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    store.make_room(size)
    assert set(store.ids()) == set(names[1:])
    store.make_room(size, keep=[names[2]])
    store.make_room(2 * size, keep=[names[2]])
    assert store.ids() == [names[2]]
    with pytest.raises(StoreError, match="no room"):
        store.make_room(4 * size - 10, keep=[names[2]])
    with pytest.raises(StoreError, match="capacity_gb"):
        store.make_room(5 * size)
    assert store.ids() == [names[2]]


def test_one_client_cannot_evict_what_others_keep(tmp_path):
    size = 100 * GEOMETRY.bytes_per_token
    store = make_store(tmp_path, capacity=int(6.5 * size))
    mine, theirs = [keep(store, 100, seed, client="a" * 32)[0] for seed in range(2)], []
    edit = store.compose([Piece(mine[0], 0, 100)], digest_ids(range(100)), "a" * 32).id
    for seed in range(2, 20):
        store.make_room(size, client="b" * 32)
        theirs.append(keep(store, 100, seed, client="b" * 32)[0])
    assert set(store.ids()) == {*mine, edit, *theirs[-4:]}
    store.make_room(size, client="a" * 32)  # a third of mine beside four of theirs
    assert set(store.ids()) == {*mine, edit, *theirs[-3:]}
    keep(store, 100, 30, client="a" * 32)
    store.make_room(3 * size, client="c" * 32)  # equal shares
    assert {store.entry(name).client for name in store.ids()} == {"a" * 32, "b" * 32}


def test_those_who_do_not_say_who_they_are_count_as_one(tmp_path):
    size = 100 * GEOMETRY.bytes_per_token
    store = make_store(tmp_path, capacity=int(4.5 * size))
    mine = keep(store, 100, 1, client="a" * 32)[0]
    for seed in range(8):
        store.make_room(size)
        keep(store, 100, seed)
    assert mine in store.ids()
    assert len(store.ids()) == 4


def test_a_half_written_entry_of_a_dead_process_is_cleaned_up(tmp_path):
    store = make_store(tmp_path)
    keys, values = some_states(10)
    old, new = store.new_id(), store.new_id()
    store.write(old, 0, 0, keys, values)
    store.write(new, 0, 0, keys, values)
    os.utime(tmp_path / f".{old}.pending", (0, 0))
    store.clean()
    assert os.listdir(tmp_path) == [f".{new}.pending"]


@pytest.mark.parametrize("name", ["../../etc", "/tmp/x", "", "A" * 32, None, 7, "0" * 31])
def test_only_ids_name_entries(tmp_path, name):
    with pytest.raises(EngineError, match="32 hexadecimal digits"):
        make_store(tmp_path).entry(name)
    with pytest.raises(EngineError, match="32 hexadecimal digits"):
        read_demand({KEY: {"load": [[name, 0, 1, 0]]}})


@pytest.mark.parametrize(
    "said",
    [
        7,
        {"path": "/tmp"},
        {"save": [[3, 3, 0]]},
        {"save": [[-1, 3, 0]]},
        {"save": [[0, 3.5, 0]]},
        {"save": [[0]]},
        {"save": 3},
        {"load": [["0" * 32]]},
        {"edit": "0" * 32, "load": [["0" * 32, 0, 1, 0]]},
    ],
)
def test_malformed_demands_are_refused(said):
    with pytest.raises(EngineError):
        read_demand({KEY: said})


@given(st.integers(0, 2**31), st.integers(1, 99), st.integers(-99, 99))
def test_a_demand_reads_back_as_it_was_said(start, count, move):
    piece = Piece("0" * 32, start, start + count, move)
    for demand in (
        Demand(load=(piece,), save=(Save(start, start + count, move),)),
        Demand(compose=(piece,)),
        Demand(edit="1" * 32, drop=("2" * 32,), about=True, client="3" * 32),
    ):
        assert read_demand(demand.params()) == demand


def test_other_connectors_parameters_are_none_of_ours():
    assert read_demand(None) is None
    assert read_demand({"do_remote_prefill": True}) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_taking_and_putting_pieces_is_slicing(lengths, data):
    pieces = tuple(Piece(f"{number:032x}", 7, 7 + length) for number, length in enumerate(lengths))

    def flat(some):
        return [(piece.entry, place) for piece in some for place in range(piece.start, piece.end)]

    total = sum(lengths)
    start = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(start + 1, total))
    assert flat(take(pieces, start, end)) == flat(pieces)[start:end]
    new = Piece("f" * 32, 0, end - start)
    assert flat(put(pieces, start, new)) == [*flat(pieces)[:start], *flat([new]), *flat(pieces)[end:]]
