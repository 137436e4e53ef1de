"""A stand-in for a vLLM server: the same HTTP answers, computed by a tiny transformers model and the real store.

It serves what the connector serves (load, save, compose, edit, drop, look), without a prefix cache, so that everything a session
does can be tested where vLLM is not installed. The real thing is tested in test_vllm_server.py. A random model has no key that
none of its queries likes, so states that are meant to be attended to by nothing (values of zero) are masked.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache

from conftest import make_tokenizer, text_model
from kveraser.engines.vllm.client.http import VLLMClient
from kveraser.engines.vllm.protocol import KEY, read_demand
from kveraser.engines.vllm.server.entries import Geometry, digest_ids
from kveraser.engines.vllm.server.looking import Looking, about_readers
from kveraser.engines.vllm.server.store import EditStore
from kveraser.engines.vllm.server.turning import write_turning
from kveraser.errors import EngineError
from kveraser.model.rope import frequencies, rotate
from kveraser.readers import Turning
from kveraser.readers.observing import observe


class StandIn(VLLMClient):
    """Answers like a server with our connector."""

    def __init__(self, folder, eraser, window, repair, learns=False):
        super().__init__("http://stand-in")
        self.model, self.eraser = text_model(), eraser.attached(text_model())
        self.tokenizer = make_tokenizer()
        config = self.model.config
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.geometry = Geometry("tiny", "float32", config.num_hidden_layers, heads, width)
        self.store = EditStore(folder, 2**30, self.geometry)
        self.about = {"window": window, "repair": repair, "max_tokens": 4096, "close_gaps": True}
        self.looking = None
        if eraser.calibration is not None or learns:
            eraser.save_pretrained(folder.parent / f"{folder.name}-eraser")
            self.looking = Looking(
                self.store, folder.parent / f"{folder.name}-eraser", eraser.config, config.num_attention_heads
            )
            write_turning(self.store, Turning.of(self.model))
            self.about |= about_readers(self.looking)
        self.prompts = []
        self.broken = False

    def call(self, path, body=None):
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}, {"id": "eraser", "parent": "tiny"}]}
        if path == "/tokenize":
            return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        if self.broken:
            raise EngineError("the stand-in is out of order")
        ids, demand = body["prompt"], read_demand(body.get("kv_transfer_params"))
        self.prompts.append(ids)
        said, pieces = {}, ()
        if demand is not None:
            if demand.look:
                said["found"] = self.looking.look(demand.look).said()
            if demand.learn:
                self.about |= self.looking.learn(demand.learn)
            for name in demand.drop:
                self.store.drop(name)
            if demand.about:
                said["about"] = self.about
            pieces = demand.load
            if demand.compose:
                edit = self.store.compose(demand.compose, digest_ids(ids[: sum(map(len, demand.compose))]))
                said["edit"] = {"id": edit.id, "tokens": edit.tokens, "salt": edit.salt}
                pieces = demand.compose
            if demand.edit:
                edit = self.store.entry(demand.edit)
                if digest_ids(ids[: edit.tokens]) != edit.ids or body["cache_salt"] != edit.salt:
                    raise EngineError("other ids")
                pieces = edit.pieces
        model = self.eraser if body["model"] == "eraser" else self.model
        cache, new = self._run(model, ids, pieces, body["max_tokens"])
        if demand is not None and demand.save:
            said["saved"] = [self._save(cache, save) for save in demand.save]
            if demand.observe:
                said["saved"] += self._queries(ids)
        return {
            "choices": [{"token_ids": new, "text": self.tokenizer.decode(new, skip_special_tokens=True)}],
            "kv_transfer_params": {KEY: said},
        }

    @torch.no_grad()
    def _run(self, model, ids, pieces, count):
        cache = DynamicCache()
        loaded = min(sum(map(len, pieces)), len(ids) - 1)
        seen = torch.ones(1, len(ids) + count, dtype=torch.long)
        if loaded:
            every = range(self.geometry.layers), range(self.geometry.kv_heads)
            parts = [
                (piece, self.store.read(self.store.entry(piece.entry), piece.start, piece.end, *every))
                for piece in pieces
            ]
            inv_freq = frequencies(self.model)
            for layer in every[0]:
                keys = [rotate(k[layer].transpose(0, 1)[None], piece.move, inv_freq) for piece, (k, _) in parts]
                values = [v[layer].transpose(0, 1)[None] for _, (_, v) in parts]
                cache.update(torch.cat(keys, 2)[:, :, :loaded], torch.cat(values, 2)[:, :, :loaded], layer)
            seen[0, :loaded] = cache.layers[0].values[0].ne(0).any(-1).any(0)
        new = []
        following = torch.tensor([ids[loaded:]])
        while len(new) < count:
            places = torch.arange(cache.get_seq_length(), cache.get_seq_length() + following.shape[1])
            mask = seen[:, : int(places[-1]) + 1]
            output = model(following, past_key_values=cache, attention_mask=mask, position_ids=places[None])
            token = int(output.logits[0, -1].argmax())
            new.append(token)
            if token == self.tokenizer.eos_token_id:
                break
            following = torch.tensor([[token]])
        return cache, new

    def _save(self, cache, save):
        name = self.store.new_id()
        keys = torch.stack([rotate(layer.keys, save.move, frequencies(self.model))[0] for layer in cache.layers])
        values = torch.stack([layer.values[0] for layer in cache.layers])
        cut = slice(save.start, save.end)
        self.store.write(name, 0, 0, keys.transpose(1, 2)[:, cut], values.transpose(1, 2)[:, cut])
        self.store.seal(name, len(save))
        return name

    def _queries(self, ids):
        seen = observe(self.model, torch.tensor([ids]))
        queries = torch.stack([seen.layers[layer].queries for layer in range(self.geometry.layers)]).transpose(1, 2)
        grouped = queries.unflatten(2, (self.geometry.kv_heads, -1))
        names = []
        for number in range(self.looking.of_queries):
            one, other = (grouped[..., min(2 * number + place, grouped.shape[3] - 1), :] for place in (0, 1))
            names.append(self.store.new_id())
            self.store.write(names[-1], 0, 0, one, other)
            self.store.seal(names[-1], len(ids))
        return names
