"""The eraser: its files, its fit to a model, and that the user's model is left as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import kveraser as kv
from conftest import FAMILIES, build, make_config, prefill, random_eraser, same, states, tiny, token_ids
from kveraser.eraser import shipped_eraser


def erased(model, eraser, ids=None):
    ids = token_ids(30) if ids is None else ids
    cache = prefill(model, ids)
    kv.erase(model, cache, ids, kv.Span(8, 15), eraser=eraser)
    return states(cache)


def portrait(model):
    """Everything that an edit must not change about a model."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        "buffers": [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        "keys": list(model.state_dict()),
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "config": json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "grads": [p.grad is None for p in model.parameters()],
    }


def unchanged(before, after):
    for key, value in before.items():
        if key in ("parameters", "buffers"):
            for old, new in zip(value, after[key], strict=True):
                assert old[:-1] == new[:-1]
                assert torch.equal(old[-1], new[-1])
        else:
            assert value == after[key], key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", list(kv.methods()))
def test_the_users_model_is_left_as_it_was(family, method):
    model = build(make_config(family)).train()
    model.model.config if hasattr(model, "model") else model.config
    before = portrait(model)
    ids = token_ids(30)
    cache = prefill(model.eval(), ids)
    model.train()
    eraser = random_eraser(model)
    kv.erase(model, cache, ids, kv.Span(8, 15), method=method, eraser=eraser)
    unchanged(before, portrait(model))


def test_the_users_model_is_left_as_it_was_after_an_exception():
    model = build(make_config("llama"))
    eraser = random_eraser(model)
    ids = token_ids(30)
    cache = prefill(model, ids)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    before = portrait(model)
    with pytest.raises(RuntimeError, match="stop"):
        kv.erase(model, cache, ids, kv.Span(8, 15), eraser=eraser)
    unchanged(before, portrait(model))
    hook.remove()


def test_dropout_of_a_model_in_training_mode_never_reaches_the_cache():
    model = build(make_config("llama", attention_dropout=0.5))
    eraser = random_eraser(model)
    ids = token_ids(30)
    expected = erased(model, eraser)
    cache = prefill(model, ids)
    model.train()
    kv.erase(model, cache, ids, kv.Span(8, 15), eraser=eraser)
    assert model.training
    assert same(states(cache), expected)


def test_adapters_of_the_users_own_stay_active_and_untouched():
    plain = build(make_config("llama"))
    eraser = random_eraser(plain)
    user = get_peft_model(
        build(make_config("llama")), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    user.eval()
    before = portrait(user)
    ids = token_ids(30)
    cache = prefill(user, ids)
    kv.erase(user, cache, ids, kv.Span(8, 15), eraser=eraser)
    unchanged(before, portrait(user))
    fresh = kv.KVEraser.new(user, rank=4)
    assert fresh.layers.keys() == eraser.layers.keys()
    zero = prefill(user, ids, [8, 15])
    expected = states(zero)
    kv.erase(user, zero, ids, kv.Span(8, 15), eraser=fresh)
    assert same(states(zero), expected)  # re-encoded with the user's adapter on
    with user.disable_adapter():
        off = prefill(user, ids)
    assert not same(states(off), expected)


def test_a_compiled_or_wrapped_model_is_looked_through():
    model = tiny()

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = model

    assert kv.erase(
        Wrapper(), prefill(model, token_ids(30)), token_ids(30), kv.Span(8, 15), eraser=random_eraser(model)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_gives_the_same_eraser(family, tmp_path):
    model = tiny(family)
    eraser = random_eraser(model, window=(2, 6), repair=3)
    eraser.save_pretrained(tmp_path / "e", dtype=torch.float32, notes={"by": "test"})
    loaded = kv.KVEraser.from_pretrained(tmp_path / "e", model)
    assert loaded.window == (2, 6)
    assert loaded.repair == 3
    assert loaded.config.notes == {"by": "test"}
    assert same(erased(model, loaded), erased(model, eraser))


def test_an_eraser_that_goes_by_the_length_of_spans_is_loaded_as_one(tmp_path):
    model, ids = tiny(), token_ids(400)
    random_eraser(model, repair=None).save_pretrained(tmp_path / "e")
    loaded = kv.KVEraser.from_pretrained(tmp_path / "e", model)
    assert loaded.repair is None
    receipt = kv.erase(model, prefill(model, ids), ids, kv.Span(20, 70), eraser=loaded)
    assert receipt.tokens_recomputed == 50 + 100


@pytest.mark.parametrize(
    ("options", "number"),
    [({}, 2), ({"acts_on": "readers", "repair": 3}, 3), ({"values": "learned"}, 4), ({"repair": None}, 5)],
)
def test_what_older_versions_do_not_know_is_in_a_newer_format_only(options, number, tmp_path):
    model = build(make_config("llama"))
    random_eraser(model, **options).save_pretrained(tmp_path, dtype=torch.float32)
    assert json.loads((tmp_path / "kveraser.json").read_text())["format"] == number
    loaded = kv.KVEraser.from_pretrained(tmp_path, model)
    assert (loaded.config.acts_on, loaded.config.values) == (
        options.get("acts_on", "spans"),
        options.get("values", "own"),
    )
    assert same(erased(model, loaded), erased(model, random_eraser(model, **options)))


def test_learned_values_are_for_spans_and_for_models_that_project_values_by_themselves():
    model = build(make_config("llama"))
    with pytest.raises(kv.OptionError, match="values='learned' is for erasers that act on spans"):
        kv.KVEraser.new(model, values="learned", acts_on="readers", repair=3)
    with pytest.raises(kv.OptionError, match="projection of its own for values"):
        kv.KVEraser.new(model, values="learned", target_modules=["k_proj"])


def test_peft_itself_can_read_the_adapter(tmp_path):
    from peft import PeftModel

    model = build(make_config("llama"))
    eraser = random_eraser(model)
    eraser.save_pretrained(tmp_path, dtype=torch.float32)
    ids = token_ids(12)
    with torch.no_grad():
        ours = eraser.attached(model)(ids).logits
        theirs = PeftModel.from_pretrained(build(make_config("llama")), tmp_path)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gradients", [False, True])
def test_an_eraser_for_the_first_tokens_leaves_what_later_ones_alone_compute_to_the_plain_model(family, gradients):
    model, ids = tiny(family), token_ids(9)
    eraser = random_eraser(model)
    apart = torch.eye(9, dtype=torch.bool)[None, None]  # every token sees itself alone
    mask = torch.zeros(apart.shape).masked_fill(~apart, torch.finfo(torch.float32).min)
    with torch.set_grad_enabled(gradients):
        plain, whole, first = (
            view(input_ids=ids, attention_mask=mask).logits[0]
            for view in (model, eraser.attached(model), eraser.attached(model, first=4))
        )
    torch.testing.assert_close(first[:4], whole[:4])
    torch.testing.assert_close(first[4:], plain[4:])
    assert not torch.allclose(whole[4:], plain[4:])


def test_saving_twice_gives_the_same_bytes(tmp_path):
    eraser = random_eraser(tiny())
    for name in ("a", "b"):
        eraser.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors", "kveraser.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_eraser_of_another_shape_or_other_weights_is_refused(tmp_path):
    random_eraser(tiny()).save_pretrained(tmp_path)
    with pytest.raises(kv.EraserMismatchError, match="num_hidden_layers.*full-recompute"):
        kv.KVEraser.from_pretrained(tmp_path, build(make_config("llama", num_hidden_layers=2)))
    sibling = build(make_config("llama"), seed=5)
    with pytest.raises(kv.EraserMismatchError, match="weights are other ones"):
        kv.KVEraser.from_pretrained(tmp_path, sibling)
    assert kv.KVEraser.from_pretrained(tmp_path, sibling, check_weights=False)
    ids = token_ids(30)
    cache = prefill(sibling, ids)
    before = states(cache)
    with pytest.raises(kv.EraserMismatchError, match="another model"):
        kv.erase(sibling, cache, ids, kv.Span(8, 15), eraser=kv.KVEraser.from_pretrained(tmp_path, tiny()))
    assert same(states(cache), before)


def test_the_same_weights_in_another_type_are_the_same_backbone(tmp_path):
    random_eraser(tiny()).save_pretrained(tmp_path)
    assert kv.KVEraser.from_pretrained(tmp_path, build(make_config("llama")).to(torch.bfloat16))


def test_a_rank_that_does_not_fit_the_weights_is_refused(tmp_path):
    random_eraser(tiny()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(kv.EraserMismatchError, match="rank 7"):
        kv.KVEraser.from_pretrained(tmp_path, tiny())


def _drop_tensor(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "kveraser.json").write_text("{"), "cannot be read"),
        (lambda f: [(f / name).unlink() for name in ("kveraser.json", "adapter_config.json")], "holds neither"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 40), "damaged"),
        (_drop_tensor, "lacks 1"),
        (
            lambda f: (f / "kveraser.json").write_text(
                (f / "kveraser.json").read_text().replace('"format": 2', '"format": 9')
            ),
            "update",
        ),
    ],
)
def test_a_damaged_eraser_is_refused(tmp_path, damage, words):
    random_eraser(tiny()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(kv.EraserMismatchError, match=words):
        kv.KVEraser.from_pretrained(tmp_path, tiny())


def test_a_model_for_which_none_ships_is_told_what_to_do():
    with pytest.raises(kv.EraserMismatchError, match=r"full-recompute.*kveraser train"):
        shipped_eraser(tiny())


def test_making_an_eraser_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    kv.KVEraser.new(tiny(), rank=2)
    assert torch.equal(torch.rand(4), expected)


def test_making_an_eraser_leaves_the_random_state_of_accelerators_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    kv.KVEraser.new(tiny(), seed=7)
    assert seeded == []


def test_impossible_settings_are_refused():
    with pytest.raises(kv.OptionError, match="rank=0"):
        kv.KVEraser.new(tiny(), rank=0)


def test_an_eraser_is_pushed_to_the_hub_as_it_was_saved(tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            uploaded["repo"] = (repo_id, private)

        def upload_folder(self, repo_id, folder_path):
            uploaded["files"] = sorted(file.name for file in Path(folder_path).iterdir())
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    eraser = random_eraser(tiny())
    assert eraser.push_to_hub("me/mine", private=True, token="secret") == "https://hub/me/mine/commit/1"
    assert uploaded["repo"] == ("me/mine", True)
    assert uploaded["files"] == ["adapter_config.json", "adapter_model.safetensors", "kveraser.json"]
    eraser.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("A card.")
    eraser.push_to_hub("me/mine", folder=tmp_path, token="secret")
    assert "README.md" in uploaded["files"]
