"""Folders of small dual encoders with random weights and their tokenizers."""

import json
from pathlib import Path

import numpy as np

from cap_pretrain.data.text import byte_pairs
from tests.convert import torch_models
from tests.parity import require

torch, transformers = require("torch"), require("transformers")

LENGTH = 12
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": LENGTH,
}
TEXTS = ["a red star!", "!", "!!! THE the", "", "It's   a café, 😀 & a very long text " * 3, "x"]

_MERGES = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("!", "!</w>")]


def vocabulary() -> byte_pairs.BytePairs:
    """Return CLIP's letters with a few merges, in the order of CLIP."""
    letters = sorted(byte_pairs._LETTERS)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, _MERGES)]
    tokens += [byte_pairs.START, byte_pairs.END]
    return byte_pairs.BytePairs({token: n for n, token in enumerate(tokens)}, _MERGES)


def write_clip_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt."""
    folder.mkdir(exist_ok=True)
    pairs = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(dict(pairs.ids)))
    lines = ["#version: 0.2", *map(" ".join, pairs.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def clip(folder: Path):
    """Write a CLIPModel with its tokenizer; return both as transformers loads them."""
    write_clip_tokenizer(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(folder)
    ids = vocabulary().ids
    text = TEXT | {
        "vocab_size": len(ids),
        "bos_token_id": ids[byte_pairs.START],
        "eos_token_id": ids[byte_pairs.END],
    }
    config = transformers.CLIPConfig(
        vision_config=torch_models.VISION, text_config=text, projection_dim=40
    )
    model = torch_models.randomised(transformers.CLIPModel(config))
    torch_models.save(model, folder)
    return model, tokenizer


def siglip(folder: Path, pieces: Path):
    """Write a SiglipModel with a sentencepiece model; return it and its tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(pieces.read_bytes())
    tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(folder)
    width = torch_models.VISION["hidden_size"]
    text = TEXT | {"vocab_size": tokenizer.vocab_size, "projection_size": width}
    config = transformers.SiglipConfig(vision_config=torch_models.VISION, text_config=text)
    model = torch_models.randomised(transformers.SiglipModel(config))
    torch_models.save(model, folder)
    return model, tokenizer


def embeddings(model, tokenizer, images, mean, std):
    """Return what a model of transformers computes: image and text vectors, and logits."""
    inputs = tokenizer(
        TEXTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(
            pixel_values=torch_models.pixels(images, mean, std), input_ids=inputs["input_ids"]
        )
    parts = (out.image_embeds, out.text_embeds, out.logits_per_image)
    return [np.asarray(part) for part in parts]


def write_open_clip(folder: Path, model) -> None:
    """Write a CLIPModel of transformers under the names of OpenCLIP."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    state, tensors = model.state_dict(), {}
    plain = {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
    }
    modules = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    for prefix, tower in (("visual.", "vision_model"), ("", "text_model")):
        depth = sum(name.endswith(".mlp.fc1.bias") and tower in name for name in state)
        for n in range(depth):
            own, other = f"{prefix}transformer.resblocks.{n}.", f"{tower}.encoder.layers.{n}."
            for ours, theirs in (
                *(("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1")),
                *(("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj")),
            ):
                modules[own + ours] = other + theirs
            for leaf in ("weight", "bias"):
                parts = [state[f"{other}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                tensors[f"{own}attn.in_proj_{leaf}"] = torch.cat(parts)
    for own, other in modules.items():
        plain |= {f"{own}.{leaf}": f"{other}.{leaf}" for leaf in ("weight", "bias")}
    tensors |= {own: state[other] for own, other in plain.items()}
    tensors["text_projection"] = state["text_projection.weight"].T.contiguous()
    tensors["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    save_file(tensors, folder / "open_clip_model.safetensors")
    vision = torch_models.VISION
    head_width = vision["hidden_size"] // vision["num_attention_heads"]
    cfg = {
        "embed_dim": model.config.projection_dim,
        "quick_gelu": True,
        "vision_cfg": {"image_size": vision["image_size"], "head_width": head_width},
        "text_cfg": {"context_length": LENGTH, "heads": TEXT["num_attention_heads"]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
