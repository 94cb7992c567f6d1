"""Malformed encoders end in a message of one or two lines, with work bounded by their size."""

import functools
import json
import os
import random
import time
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from cap_pretrain import rules
from cap_pretrain.convert import open_encoder
from cap_pretrain.convert.encoder import Form
from cap_pretrain.errors import UserError
from tests import memory
from tests.convert import hostile
from tests.convert.hostile import ODD
from tests.parity import require

KINDS = ("siglip", "clip", "vit", "openai", "dinov3_vit", "aimv2_vision_model")


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_encoders_are_read(kind, tmp_path):
    hostile.write(tmp_path, hostile.folder(kind))
    pretrained = open_encoder(tmp_path)
    assert pretrained.model["depth"] == hostile.DEPTH and pretrained.image_size == hostile.SIDE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 0}, "'patch_size' must be from 1 to 1024, found 0"),
        ({"patch_size": [4, "4"]}, "'patch_size' must be int, found '4'"),
        ({"patch_size": 16}, "'number of patches along a side' must be from 1 to 256, found 0"),
        ({"image_size": 10**400}, "'image_size' must be from 1 to .*, found 1000.*…"),
        ({"hidden_size": "768"}, "'hidden_size' must be int, found '768'"),
        ({"hidden_size": True}, "'hidden_size' must be int, found True"),
        ({"hidden_size": -768}, "'hidden_size' must be from 1 to"),
        ({"hidden_size": 2**15}, "which does not fit the rest"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be from 1 to 1024"),
        ({"num_hidden_layers": 1024}, "lacks encoder.layers.2.self_attn.k_proj.bias, .* more.$"),
        ({"intermediate_size": None}, "'intermediate_size' must be int, found None"),
        ({"num_attention_heads": 3}, "3 attention heads do not divide the width 8"),
        ({"num_channels": [3]}, "'num_channels' must be int, found a list"),
        ({"hidden_act": ["gelu"]}, "'hidden_act' must be str, found a list"),
        ({"layer_norm_eps": float("nan")}, "'layer_norm_eps' must be from 0 to 1, found nan"),
        ({"vision_use_head": "no"}, "'vision_use_head' must be bool, found 'no'"),
    ],
)
def test_a_field_out_of_bounds_is_named(fields, message, tmp_path):
    files = hostile.folder("siglip")
    files["config.json"]["vision_config"] |= fields
    refused(tmp_path, files, message)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("dinov3_vit", {"rope_theta": 0}, "'rope_theta' must be from 1 to"),
        ("dinov3_vit", {"rope_theta": "100"}, "'rope_theta' must be int or float, found '100'"),
        ("dinov3_vit", {"num_register_tokens": -1}, "'num_register_tokens' must be from 0 to"),
        ("dinov3_vit", {"num_attention_heads": 4}, "heads have 2 channels, .* a multiple of 4"),
        ("dinov3_vit", {"key_bias": 1}, "'key_bias' must be bool, found 1"),
        ("aimv2_vision_model", {"is_native": "no"}, "'is_native' must be bool, found 'no'"),
        ("aimv2_vision_model", {"image_size": [8, 4]}, r"image_size is \[8, 4\]; only squares"),
        ("aimv2_vision_model", {"hidden_size": 6}, "which does not fit the rest"),
        ("aimv2_vision_model", {"rms_norm_eps": -1}, "'rms_norm_eps' must be from 0 to 1"),
        ("aimv2_vision_model", {"use_head": True}, "lacks head"),
    ],
)
def test_a_field_of_rotary_or_gated_models_is_named(kind, fields, message, tmp_path):
    files = hostile.folder(kind)
    files["config.json"] |= fields
    refused(tmp_path, files, message)


def refused(folder, files, message):
    """Check that an encoder is refused at once and on one line."""
    hostile.write(folder, files)
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        open_encoder(folder)
    assert time.monotonic() - start < 5
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"model_type": ["siglip"]}, "'model_type' must be str, found a list"),
        ("config.json", {"vision_config": [1]}, "'vision_config' must be dict, found a list"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "'image_mean' must be list or tuple"),
        ("preprocessor_config.json", {"image_std": [1, 1]}, "'image_std' must be three numbers"),
        ("preprocessor_config.json", {"image_std": [1, 0, 1]}, "'image_std' must be from 1e-06"),
        ("preprocessor_config.json", {"rescale_factor": "x"}, "'rescale_factor' must be int or"),
        ("preprocessor_config.json", {"do_rescale": 2}, "'do_rescale' must be bool, found 2"),
    ],
)
def test_a_section_of_another_type_is_named(file, fields, message, tmp_path):
    files = hostile.folder("siglip")
    files[file] |= fields
    refused(tmp_path, files, f"{file}: {message}")


def test_odd_names_of_classes_do_not_reach_the_messages(tmp_path):
    files = hostile.folder("siglip")
    for classes in ("Name", {"a": 1}, [["a"]], ["\x1b[31m"], ["x" * 10**6]):
        files["config.json"]["architectures"] = classes
        hostile.write(tmp_path, files)
        assert open_encoder(tmp_path).source.startswith("SigLIP encoder of transformers (8 wide")


def test_a_tensor_that_would_broadcast_to_more_than_the_file_is_refused(tmp_path):
    files = hostile.folder("clip")
    files["weights"]["embeddings.class_embedding"] = np.zeros((10**5, 1), np.float32)
    files["weights"]["embeddings.position_embedding.weight"] = np.zeros((1, 10**5), np.float32)
    refused(tmp_path, files, r"class_token has the shape \[100000, 100000\], which does not fit")


def test_values_that_are_not_finite_are_refused(tmp_path):
    files = hostile.folder("vit")
    files["weights"]["layernorm.bias"][3] = np.nan
    refused(tmp_path, files, "layernorm.bias has values that are not finite numbers")


def test_a_tensor_under_two_names_is_refused(tmp_path):
    files = hostile.folder("siglip")
    files["weights"]["vision_model.post_layernorm.bias"] = np.zeros(8, np.float32)
    refused(tmp_path, files, "has post_layernorm.bias with and without 'vision_model.' before")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/dev/zero", 3, ["a"], "a\0b"])
def test_shards_outside_the_folder_are_refused(shard, tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "outside.safetensors")
    model = tmp_path / "model"
    hostile.write(model, hostile.folder("siglip"))
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index.json: shard .* must"):
        open_encoder(model)


def test_special_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(UserError, match="has neither a config.json"):
        open_encoder(tmp_path)
    model = tmp_path / "model"
    hostile.write(model, hostile.folder("siglip"))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    os.mkfifo(model / "x.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        open_encoder(model)


def test_one_of_several_files_has_to_be_chosen(tmp_path):
    for name in ("a", "b"):
        save_file({"a": np.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"has 2 files of weights \(a.safetensors, b.safetensors"):
        open_encoder(tmp_path)


@pytest.mark.parametrize(
    "extra", ["layer", "layernorm", "layer1", "layer1.x.conv1.weight", "layer9.0.x", "\n"]
)
def test_odd_names_beside_those_of_a_resnet_are_named(extra, tmp_path):
    names = ["conv1.weight", *(f"layer{n}.{k}.conv1.weight" for n in range(1, 5) for k in (0, 1))]
    arrays = {name: np.zeros((2, 2, 3, 3), np.float32) for name in (*names, extra)}
    save_file(arrays, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError) as error:
        open_encoder(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def check(path, limit):
    """Open an encoder: it is read, with parameters bounded by `limit` bytes, or refused."""
    try:
        params = rules.flatten(open_encoder(path).params)
    except UserError as error:
        text = str(error)
        assert len(text.splitlines()) <= 2 and len(text) < 1000 + len(str(path)), text
        return False
    assert all(np.isfinite(array).all() for array in params.values())
    assert sum(array.nbytes for array in params.values()) <= limit
    return True


@pytest.mark.slow
def test_thousands_of_damaged_folders_end_in_a_result_or_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(Form, "shapes", functools.cache(Form.shapes))
    with memory.below(2**20):
        read = 0
        for seed in range(2500):
            damage = random.Random(seed)
            folder = tmp_path / str(seed % 50)
            for path in folder.glob("*"):
                path.unlink()
            hostile.write(folder, hostile.folder(KINDS[seed % len(KINDS)]), damage)
            size = sum(path.stat().st_size for path in folder.glob("*"))
            start = time.monotonic()
            read += check(folder, 8 * size)
            assert time.monotonic() - start < 10, seed
        assert 100 < read < 1500


@pytest.mark.parity
def test_torch_files_that_claim_more_than_they_hold_are_refused(tmp_path):
    torch = require("torch")
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1).expand(10**5, 10**5)}, path)
    with pytest.raises(UserError, match="its tensors have 40,000,000,000 bytes, over 4 times"):
        open_encoder(path)
    torch.save({"a": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    with pytest.raises(UserError, match="its members claim more bytes than the file has"):
        open_encoder(tmp_path / "bomb.pt")


@pytest.mark.parity
@pytest.mark.slow
def test_hundreds_of_damaged_torch_files_end_in_a_result_or_a_message(tmp_path):
    torch = require("torch")
    state = {k: torch.from_numpy(v) for k, v in hostile.tensors("openai").items()}
    odd = [torch.tensor(1.0), torch.zeros(0, 2**40), torch.zeros(3, device="meta"), *ODD]
    odd += [torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64)]
    for seed in range(500):
        damage, path = random.Random(seed), tmp_path / "weights.pth"
        content = dict(state)
        if damage.random() < 0.5:
            content[damage.choice((*state, "state_dict", "", 3, "module.x"))] = damage.choice(odd)
        legacy = damage.random() < 0.5
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        if damage.random() < 0.7:
            path.write_bytes(hostile.change_bytes(damage, path.read_bytes()))
        check(path, 8 * 2**20)
