"""Erasers in other programs' formats, without any of these programs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from peft import PeftModel
from typer.testing import CliRunner

import kveraser as kv
from conftest import build, make_config, random_eraser, tiny, token_ids
from kveraser.cli import app
from kveraser.export import EraserFiles, read_gguf_eraser, write_gguf_backbone, write_gguf_eraser, write_peft_folder
from kveraser.export.names import Naming

runner = CliRunner()


@pytest.fixture
def folder(tmp_path):
    return random_eraser(tiny(), window=(2, 5), repair=3).save_pretrained(tmp_path / "eraser")


def tensors(file):
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(str(file)).tensors}


def naming(family):
    return Naming(kv.KVEraser.new(tiny(family), rank=1).config.fingerprint.shape)


def test_a_gguf_eraser_says_what_its_folder_says(folder, tmp_path):
    made = write_gguf_eraser(folder, tmp_path / "eraser.gguf")
    files = EraserFiles.read(folder)
    assert made.config == replace(files.config, choose="next")  # inside engines, until they can tell readers
    assert made.architecture == "llama"
    assert made.rank == 4
    assert made.modules == len(files.weights) == 21
    assert made.source_sha256 == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("option", "said"), [("acts_on", "readers"), ("values", "learned")])
def test_an_eraser_that_is_more_than_a_lora_on_erased_tokens_is_not_exported(option, said, tmp_path):
    folder = random_eraser(tiny(), **{"repair": 3, option: said}).save_pretrained(tmp_path / "eraser")
    for write in (write_gguf_eraser, write_peft_folder):
        with pytest.raises(kv.EraserMismatchError, match=f"{option}={said}, which works in transformers only"):
            write(folder, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_window_of_the_whole_prefix_comes_back_as_none(tmp_path):
    folder = random_eraser(tiny()).save_pretrained(tmp_path / "eraser")
    assert write_gguf_eraser(folder, tmp_path / "eraser.gguf").config.window is None


def test_every_module_has_its_tensor_pair_by_the_name_of_the_converted_weight(folder, tmp_path):
    write_gguf_eraser(folder, tmp_path / "eraser.gguf")
    names = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    wanted = {f"blk.{i}.{name}.weight.lora_{part}" for i in range(3) for name in names for part in "ab"}
    assert set(tensors(tmp_path / "eraser.gguf")) == wanted


def test_query_and_key_rows_are_interleaved_and_nothing_else(folder, tmp_path):
    write_gguf_eraser(folder, tmp_path / "eraser.gguf")
    written = tensors(tmp_path / "eraser.gguf")
    files = EraserFiles.read(folder)
    b = files.weights["model.layers.1.self_attn.q_proj"][1].float().numpy()
    q = written["blk.1.attn_q.weight.lora_b"]
    head = 8  # 32 hidden dimensions in 4 heads
    assert np.array_equal(q[2 * head + 0], b[2 * head + 0])
    assert np.array_equal(q[2 * head + 1], b[2 * head + head // 2])  # GGUF's neighbor is transformers' other half
    assert np.array_equal(q[2 * head + 2], b[2 * head + 1])
    down = files.weights["model.layers.1.mlp.down_proj"]
    assert np.array_equal(written["blk.1.ffn_down.weight.lora_b"], down[1].float().numpy())
    assert np.array_equal(written["blk.1.attn_q.weight.lora_a"], files.weights["model.layers.1.self_attn.q_proj"][0])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_rows_go_forth_and_back(family):
    rng = np.random.default_rng(0)
    for module in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{module}"
        matrix = rng.standard_normal((32 if module == "q_proj" else 16, 4))
        there = naming(family).rows(name, matrix)
        moved = module != "v_proj" and family in ("llama", "mistral")
        assert np.array_equal(there, matrix) == (not moved)
        assert np.array_equal(naming(family).rows_back(name, there), matrix)


def test_the_scaling_is_the_folders_whatever_way_it_was_made(folder, tmp_path):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["use_rslora"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_gguf_eraser(folder, tmp_path / "eraser.gguf")
    files = EraserFiles.read(folder)
    module = "model.layers.0.mlp.up_proj"
    assert files.scaling(module) == pytest.approx(8 / 4**0.5)
    b = tensors(tmp_path / "eraser.gguf")["blk.0.ffn_up.weight.lora_b"]
    assert b * (8 / 4) == pytest.approx(files.weights[module][1].float().numpy() * files.scaling(module), rel=1e-6)


def test_float16_halves_the_file_and_keeps_the_values(folder, tmp_path):
    write_gguf_eraser(folder, tmp_path / "a.gguf")
    write_gguf_eraser(folder, tmp_path / "b.gguf", dtype="f16")
    wide, narrow = tensors(tmp_path / "a.gguf"), tensors(tmp_path / "b.gguf")
    assert all(np.allclose(wide[name], narrow[name], rtol=1e-3, atol=1e-6) for name in wide)
    assert (tmp_path / "b.gguf").stat().st_size < 0.8 * (tmp_path / "a.gguf").stat().st_size


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    write_gguf_eraser(folder, tmp_path / "a.gguf")
    write_gguf_eraser(folder, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_plain_peft_folder_has_the_same_weights_and_peft_loads_it(folder, tmp_path):
    made = write_peft_folder(folder, tmp_path / "plain")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (folder / weights).read_bytes()
    assert made.config == EraserFiles.read(folder).config
    said = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert "megatron_core" in said or "use_dora" not in said
    model = build(make_config("llama"))
    eraser = kv.KVEraser.from_pretrained(folder, model)
    ids = token_ids(9)
    with torch.no_grad():
        ours = eraser.attached(model)(ids).logits
        theirs = PeftModel.from_pretrained(model, str(tmp_path / "plain"))(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_folder_of_another_family_is_refused_by_name(tmp_path):
    folder = random_eraser(tiny("gpt_neox")).save_pretrained(tmp_path / "eraser")
    with pytest.raises(kv.EraserMismatchError, match="gpt_neox"):
        write_gguf_eraser(folder, tmp_path / "eraser.gguf")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("damage", ["weights", "config", "pair", "dora"])
def test_a_damaged_folder_is_refused(folder, tmp_path, damage):
    if damage == "weights":
        (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    elif damage == "config":
        (folder / "adapter_config.json").write_text("{")
    elif damage == "pair":
        from safetensors.torch import load_file, save_file

        weights = load_file(str(folder / "adapter_model.safetensors"))
        weights.pop(next(name for name in weights if "lora_B" in name))
        save_file(weights, str(folder / "adapter_model.safetensors"))
    else:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    for write in (write_gguf_eraser, write_peft_folder):
        with pytest.raises(kv.EraserMismatchError):
            write(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_gguf_files_are_no_erasers(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF but not really")
    writer = GGUFWriter(str(tmp_path / "b.gguf"), "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("a.gguf", "b.gguf", "missing.gguf"):
        with pytest.raises(kv.EraserMismatchError):
            read_gguf_eraser(tmp_path / name)


def test_a_backbone_is_written_with_its_de_quantised_values(tmp_path):
    from gguf import GGMLQuantizationType, dequantize, quantize

    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    quantised = quantize(values, GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(str(tmp_path / "q8.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "é"])
    writer.add_tensor("blk.0.ffn_up.weight", quantised, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_norm.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = dequantize(quantised, GGMLQuantizationType.Q8_0)
    for dtype, kind in (("f32", np.float32), ("f16", np.float16)):
        made = write_gguf_backbone(tmp_path / "q8.gguf", tmp_path / "out.gguf", dtype=dtype)
        assert made["tensors"] == 2
        written = tensors(tmp_path / "out.gguf")
        assert np.array_equal(written["blk.0.ffn_up.weight"], plain.astype(kind))
        assert np.array_equal(written["blk.0.ffn_norm.weight"], values[0])
        fields = GGUFReader(str(tmp_path / "out.gguf")).fields
        assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "é"]
        assert fields["general.architecture"].contents() == "llama"


def test_the_commands_write_and_say_what_they_wrote(folder, tmp_path):
    result = runner.invoke(app, ["export", "gguf", str(tmp_path / "e.gguf"), "--eraser", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["window"] == [2, 5]
    assert said["source_sha256"] == read_gguf_eraser(tmp_path / "e.gguf").source_sha256
    result = runner.invoke(app, ["export", "peft", str(tmp_path / "p"), "--eraser", str(folder)])
    assert result.exit_code == 0, result.output
    assert "21 modules" in result.output


def test_the_eraser_that_ships_is_the_default(tmp_path):
    result = runner.invoke(app, ["export", "gguf", str(tmp_path / "e.gguf"), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["modules"], said["rank"], said["window"], said["repair"]) == (210, 16, [4, 512], 32)


@pytest.mark.parametrize("kind", ["gguf", "peft"])
def test_a_missing_eraser_is_a_named_error_and_exit_code_2(tmp_path, kind):
    result = runner.invoke(app, ["export", kind, str(tmp_path / "out"), "--eraser", str(tmp_path / "no"), "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "EraserMismatchError"


def test_a_missing_gguf_file_is_a_named_error(tmp_path):
    result = runner.invoke(
        app, ["export", "backbone", str(tmp_path / "out"), "-m", str(tmp_path / "no.gguf"), "--json"]
    )
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "BackboneError"


@pytest.mark.parametrize("kind", ["gguf", "peft", "backbone"])
def test_help_shows_an_example(kind):
    result = runner.invoke(app, ["export", kind, "--help"])
    assert "Example: kveraser export" in " ".join(result.output.split())
