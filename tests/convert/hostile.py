"""Small encoder folders in six layouts, and random damage to them."""

import copy
import gzip
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from cap_pretrain.convert import aimv2, clip, dinov3, openai, siglip, vit
from cap_pretrain.convert.tables import Fused

WIDTH, DEPTH, MLP, HEADS, PATCH, SIDE = 8, 2, 12, 2, 4, 8
PATCHES = (SIDE // PATCH) ** 2

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}

ODD: tuple[Any, ...] = (
    *(None, True, False, "", "768", "../../x", "/dev/zero", "\ud800", "a\nb", "x" * 300),
    *(-1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**400, -(10**9), 0.0, 0.5, 1e-300, 1e300),
    *(math.nan, math.inf, -math.inf, [], {}, [1, 2], [4, 4], [[]], {"a": {}}, ["siglip"]),
)
"""Values that fields of a config do not expect."""


def folder(kind: str) -> dict[str, Any]:
    """Return the files of a valid encoder: JSON by name, and "weights", arrays by name."""
    arrays = tensors(kind)
    if kind == "openai":
        config = {
            "model_cfg": {"quick_gelu": True, "vision_cfg": {"width": WIDTH, "head_width": 4}},
            "preprocess_cfg": {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]},
        }
        return {openai.CONFIG: config, "weights": arrays}
    config = {"model_type": kind, "architectures": ["Model"], "layer_norm_eps": 1e-6}
    if kind == "vit":
        config |= SIZES | {"qkv_bias": True}
    elif kind == "dinov3_vit":
        config |= SIZES | {"num_register_tokens": 1, "rope_theta": 100.0, "key_bias": False}
    elif kind == "aimv2_vision_model":
        config |= SIZES | {"use_head": False, "rms_norm_eps": 1e-5}
    else:
        config["vision_config"] = SIZES | {"vision_use_head": False}
    processor = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {"config.json": config, "preprocessor_config.json": processor, "weights": arrays}


def tensors(kind: str) -> dict[str, np.ndarray]:
    """Return random weights for such a folder."""
    table = {
        "clip": clip.NAMES,
        "siglip": siglip.NAMES,
        "vit": vit.NAMES,
        "openai": openai.NAMES,
        "dinov3_vit": {k: v for k, v in dinov3.NAMES.items() if not k.endswith("gate")},
        "aimv2_vision_model": aimv2.NAMES,
    }
    kernels = {
        "blocks/mlp/up": (MLP, WIDTH),
        "blocks/mlp/gate": (MLP, WIDTH),
        "blocks/mlp/down": (WIDTH, MLP),
        "patch_embedding": (WIDTH, 3, PATCH, PATCH),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for path, entry in table[kind].items():
        if path.startswith("head") or not isinstance(entry, (str, Fused)):
            continue
        for layer in range(DEPTH if path.startswith("blocks") else 1):
            if isinstance(entry, Fused):
                name, shape = entry.name.format(layer) + "_", (3 * WIDTH, WIDTH)
            else:
                name = entry.format(layer) + "."
                shape = kernels.get(path, (WIDTH, WIDTH) if "attention" in path else (WIDTH,))
            shapes |= {name + "weight": shape, name + "bias": shape[:1]}
    if kind in ("clip", "openai"):
        del shapes[{"clip": "embeddings.patch_embedding", "openai": "visual.conv1"}[kind] + ".bias"]
    if kind == "dinov3_vit":
        shapes = {k: v for k, v in shapes.items() if not k.endswith("k_proj.bias")}
    if kind == "aimv2_vision_model":
        without = {k for k in shapes if k.endswith(".bias") and "patch_embed" not in k}
        shapes = {k: v for k, v in shapes.items() if k not in without}
    more = {
        "clip": {
            "embeddings.class_embedding": (WIDTH,),
            "embeddings.position_embedding.weight": (1 + PATCHES, WIDTH),
        },
        "openai": {
            "visual.class_embedding": (WIDTH,),
            "visual.positional_embedding": (1 + PATCHES, WIDTH),
        },
        "vit": {
            "embeddings.cls_token": (1, 1, WIDTH),
            "embeddings.position_embeddings": (1, 1 + PATCHES, WIDTH),
        },
        "siglip": {"embeddings.position_embedding.weight": (PATCHES, WIDTH)},
        "aimv2_vision_model": {"embeddings.position_embedding.weight": (PATCHES, WIDTH)},
        "dinov3_vit": {
            "embeddings.cls_token": (1, 1, WIDTH),
            "embeddings.register_tokens": (1, 1, WIDTH),
            **{
                f"layer.{layer}.{name}": shape
                for layer in range(DEPTH)
                for name, shape in (
                    ("attention.o_proj.weight", (WIDTH, WIDTH)),
                    ("attention.o_proj.bias", (WIDTH,)),
                    ("mlp.down_proj.weight", (WIDTH, MLP)),
                    ("mlp.down_proj.bias", (WIDTH,)),
                    ("layer_scale1.lambda1", (WIDTH,)),
                    ("layer_scale2.lambda1", (WIDTH,)),
                )
            },
        },
    }
    shapes = {k: v for k, v in shapes.items() if "position" not in k} | more[kind]
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(folder: Path, files: dict[str, Any], damage: random.Random | None = None) -> None:
    """Write a folder, after changing fields, tensors or bytes if there is `damage`."""
    files = copy.deepcopy(files)
    config = next(iter(files))
    weights = "open_clip_model.safetensors" if config == openai.CONFIG else "model.safetensors"
    where = damage.random() if damage else 1.0
    if damage and where < 0.4:
        for _ in range(damage.choice((1, 1, 2))):
            change_json(damage, files[damage.choice([n for n in files if n != "weights"])])
    elif damage and where < 0.65:
        change_tensors(damage, files["weights"])
    content = {weights: save(files.pop("weights"))}
    for name, value in files.items():
        content[name] = json.dumps(value).encode()
    if damage and 0.65 <= where < 0.8:
        content[weights] = change_header(damage, content[weights])
    elif damage and 0.8 <= where < 0.9:
        names = ["one.safetensors", "two.safetensors"]
        index = {"weight_map": {"a": names[0], "b": names[1]}}
        change_json(damage, index)
        whole = content.pop(weights)
        content |= dict.fromkeys(names[: damage.randint(0, 2)], whole)
        content[f"{weights}.index.json"] = json.dumps(index).encode()
    elif damage and where >= 0.9:
        name = damage.choice(list(content))
        content[name] = change_bytes(damage, content[name])
    folder.mkdir(exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


def change_json(damage: random.Random, value: Any) -> None:
    """Replace, add, rename or remove one entry of nested JSON."""
    places = []

    def walk(node: Any) -> None:
        keys = node if isinstance(node, dict) else range(len(node))
        for key in list(keys):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = damage.choice(places)
    odd = copy.deepcopy(damage.choice(ODD))
    action = damage.random()
    if action < 0.8:
        node[key] = odd
    elif isinstance(node, dict) and action < 0.9:
        del node[key]
    elif isinstance(node, dict):
        node[damage.choice(("patch_size", "num_channels", "hidden_act", "rescale_factor"))] = odd
    else:
        node.append(odd)


def change_tensors(damage: random.Random, arrays: dict[str, np.ndarray]) -> None:
    """Remove, rename, add or alter one tensor."""
    name = damage.choice(list(arrays))
    array = arrays[name]
    column = np.zeros((array.size, 1), np.float32)
    changed: tuple[Any, ...] = (
        *(array.T.copy(), array[None], array.reshape(-1), array[:0], array[..., :1].copy()),
        *(np.float32(1) * array[(0,) * array.ndim], column, column[None], column.T.copy()),
        *(array.astype(t) for t in (np.int8, np.float16, np.float64, np.uint64, bool)),
        *(np.full_like(array, value) for value in (np.nan, np.inf)),
        *(np.full(array.shape, 1e300), np.repeat(array, 2, axis=0), np.zeros((0, 2**40), np.int8)),
    )
    action = damage.random()
    if action < 0.7:
        arrays[name] = np.ascontiguousarray(damage.choice(changed))
    elif action < 0.8:
        del arrays[name]
    elif action < 0.9:
        arrays[damage.choice(("", "\n", "vision_model." + name, "vit." + name, "é" * 200))] = array
    else:
        arrays[name.replace("0", damage.choice(("1", "00", "٣", "9999999", "-1")))] = array


def change_header(damage: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(damage.choice((1, 2))):
        change_json(damage, header)
    text = json.dumps(header).encode()
    if damage.random() < 0.2:
        text = b"[" * 100_000 + text
    claimed = damage.choice((len(text),) * 5 + (0, 2**24 + 1, 2**40, 2**64 - 1, len(text) - 1))
    return struct.pack("<Q", claimed) + text + rest


def change_bytes(damage: random.Random, data: bytes) -> bytes:
    """Cut, repeat, overwrite or compress bytes."""
    at = damage.randrange(len(data) + 1)
    return damage.choice(
        (
            data[:at],
            data + data[:at],
            data[:at] + damage.randbytes(damage.randint(1, 9)) + data[at + 4 :],
            damage.randbytes(at),
            b"\xef\xbb\xbf" + data,
            b"[" * 100_000,
            gzip.compress(data),
            gzip.compress(data)[:at],
            data.decode("latin-1").encode("utf-16"),
        )
    )
