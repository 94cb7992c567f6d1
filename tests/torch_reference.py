"""Reference models from torch's transformer layers, for the parity tests.

Written from the description of the architecture. Parameters come as the nested dict that a learner
splits into: kernels [in, out], layers stacked along a leading axis.
"""

from typing import Any

import numpy as np

from tests.parity import require

torch = require("torch")
nn, F = torch.nn, torch.nn.functional

EPSILON = 1e-6  # of every layer normalization


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def load(module: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Load all parameters of `module`, without missing or unused ones."""
    module.load_state_dict({name: tensor(value) for name, value in state.items()}, strict=True)
    return module.eval().requires_grad_(False)


def attention_state(prefix: str, p: dict) -> dict[str, Any]:
    parts = [p[name] for name in ("query", "key", "value")]
    kernels = [part["kernel"].T for part in parts]
    if kernels[0].shape == kernels[1].shape:
        state = {prefix + "in_proj_weight": np.concatenate(kernels)}
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        state = {prefix + name: kernel for name, kernel in zip(names, kernels, strict=True)}
    state[prefix + "out_proj.weight"] = p["out"]["kernel"].T
    if "bias" in p["out"]:
        state[prefix + "in_proj_bias"] = np.concatenate([part["bias"] for part in parts])
        state[prefix + "out_proj.bias"] = p["out"]["bias"]
    return state


def linear_state(prefix: str, p: dict) -> dict[str, Any]:
    renamed = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    return {prefix + renamed[k]: v.T for k, v in p.items()}


def unstack(blocks: dict) -> list[dict]:
    """Split the parameters of stacked layers into those of each layer."""
    if isinstance(blocks, dict):
        parts = {name: unstack(part) for name, part in blocks.items()}
        depth = len(next(iter(parts.values())))
        return [{name: part[i] for name, part in parts.items()} for i in range(depth)]
    return list(np.asarray(blocks))


def norm(p: dict, x: torch.Tensor) -> torch.Tensor:
    bias = tensor(p["bias"]) if "bias" in p else None
    return F.layer_norm(x, x.shape[-1:], tensor(p["scale"]), bias, EPSILON)


def linear(p: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, tensor(p["kernel"].T), tensor(p["bias"]))


def encoder_layers(
    blocks: dict,
    x: torch.Tensor,
    heads: int,
    blocked: torch.Tensor | None = None,
    bias: bool = True,
) -> torch.Tensor:
    """Apply pre-norm self-attention layers, with biases or without, to x [B, N, D].

    `blocked` [B, N, N] is True where a position must not attend; None is nowhere.
    """
    mask = None if blocked is None else blocked.repeat_interleave(heads, dim=0)
    for p in unstack(blocks):
        layer = nn.TransformerEncoderLayer(
            x.shape[-1],
            heads,
            p["mlp"]["up"]["kernel"].shape[1],
            activation=gelu,
            layer_norm_eps=EPSILON,
            batch_first=True,
            norm_first=True,
            bias=bias,
        )
        state = attention_state("self_attn.", p["attention"])
        state |= linear_state("norm1.", p["norm1"]) | linear_state("norm2.", p["norm2"])
        state |= linear_state("linear1.", p["mlp"]["up"])
        state |= linear_state("linear2.", p["mlp"]["down"])
        x = load(layer, state)(x, src_mask=mask)
    return x


def decoder_layers(
    blocks: dict, x: torch.Tensor, encoded: torch.Tensor, blocked: torch.Tensor, heads: int
) -> torch.Tensor:
    """Apply pre-norm decoder layers without biases to x [B, T, D] and encoded [B, N, E].

    `blocked` [B, T, T] is True where a position must not attend.
    """
    for p in unstack(blocks):
        layer = nn.TransformerDecoderLayer(
            x.shape[-1],
            heads,
            p["mlp"]["up"]["kernel"].shape[1],
            activation=gelu,
            layer_norm_eps=EPSILON,
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        widths = dict(kdim=encoded.shape[-1], vdim=encoded.shape[-1])
        layer.multihead_attn = nn.MultiheadAttention(
            x.shape[-1], heads, bias=False, batch_first=True, **widths
        )
        state = attention_state("self_attn.", p["self_attention"])
        state |= attention_state("multihead_attn.", p["cross_attention"])
        for name in ("norm1", "norm2", "norm3"):
            state |= linear_state(name + ".", p[name])
        state |= linear_state("linear1.", p["mlp"]["up"])
        state |= linear_state("linear2.", p["mlp"]["down"])
        x = load(layer, state)(x, encoded, tgt_mask=blocked.repeat_interleave(heads, dim=0))
    return x


def chosen(x: torch.Tensor, index: np.ndarray | None) -> torch.Tensor:
    """Return the tokens of x [B, N, D] at int [B, K], or all of them."""
    if index is None:
        return x
    return torch.stack([row[tensor(own).long()] for row, own in zip(x, index, strict=True)])


def vit(
    params: dict,
    images: np.ndarray,
    heads: int,
    kept: np.ndarray | None = None,
    blocked: torch.Tensor | None = None,
    hidden: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode uint8 images [B, H, W, 3] as tokens [B, N, D] and pooled [B, D].

    With `kept`, int [B, K], the layers see only these patches. `blocked` is that of
    `encoder_layers`. `hidden` are a bool [B, N] and what replaces these patches, [D].
    """
    kernel = params["patch_embedding"]["kernel"]
    patch = round((kernel.shape[0] / 3) ** 0.5)
    weight = tensor(kernel).reshape(patch, patch, 3, -1).permute(3, 2, 0, 1)
    pixels = tensor(images).float().permute(0, 3, 1, 2) / 255 * 2 - 1
    x = F.conv2d(pixels, weight, tensor(params["patch_embedding"]["bias"]), stride=patch)
    x = x.flatten(2).transpose(1, 2)
    if hidden is not None:
        x = torch.where(tensor(hidden[0])[..., None], tensor(hidden[1]), x)
    x = chosen(x + tensor(params["positions"]), kept)
    tokens = norm(params["norm"], encoder_layers(params["blocks"], x, heads, blocked))
    if "head" not in params:
        return tokens, tokens.mean(1)
    head = params["head"]
    attention = nn.MultiheadAttention(tokens.shape[-1], heads, batch_first=True)
    load(attention, attention_state("", head["attention"]))
    probe = tensor(head["probe"]).expand(len(tokens), 1, -1)
    x, _ = attention(probe, tokens, tokens)
    y = linear(head["mlp"]["down"], gelu(linear(head["mlp"]["up"], norm(head["norm"], x))))
    return tokens, (x + y)[:, 0]


def captioner(
    params: dict,
    images: np.ndarray,
    text: np.ndarray,
    parallel: np.ndarray,
    heads: int,
    decoder_heads: int | None = None,
    kept: np.ndarray | None = None,
) -> torch.Tensor:
    """Return logits [B, T, V]; rows in `parallel` [B] read mask tokens without a causal mask.

    With `kept`, int [B, K], the decoder reads only these tokens of the encoder.
    """
    decoder, length = params["decoder"], text.shape[1]
    embedding = tensor(decoder["embedding"]["embedding"])
    inputs = tensor(text).long().roll(1, dims=1)
    inputs[:, 0] = 0
    inputs[tensor(parallel)] = len(embedding) - 1
    blocked = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(len(text), 1, 1)
    blocked[tensor(parallel)] = False
    x = embedding[inputs] + tensor(params["text_positions"])
    tokens = chosen(vit(params["encoder"], images, heads)[0], kept)
    x = decoder_layers(decoder["blocks"], x, tokens, blocked, decoder_heads or heads)
    return linear(decoder["logits"], norm(decoder["norm"], x))


def pool(p: dict, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Pool tokens [B, N, E] to [B, Q, D] by learned queries, then normalize."""
    probe = tensor(p["probe"]).expand(len(tokens), -1, -1)
    widths = dict(kdim=tokens.shape[-1], vdim=tokens.shape[-1])
    attention = nn.MultiheadAttention(probe.shape[-1], heads, batch_first=True, **widths)
    load(attention, attention_state("", p["attention"]))
    return norm(p["norm"], attention(probe, tokens, tokens)[0])


def coca(
    params: dict, images: np.ndarray, text: np.ndarray, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return CoCa's logits [B, T, V] of captions, and unit vectors [B, D] of images and texts."""
    decoder, (count, length) = params["decoder"], text.shape
    tokens, _ = vit(params["encoder"], images, heads)
    inputs = tensor(text).long().roll(1, dims=1)
    inputs[:, 0] = 0
    x = tensor(decoder["embedding"]["embedding"])[inputs] + tensor(params["text_positions"])
    x = torch.cat([x, tensor(decoder["class_token"]).expand(count, 1, -1)], dim=1)
    blocked = torch.ones(length + 1, length + 1, dtype=torch.bool).triu(1).repeat(count, 1, 1)
    blocked[:, -1, 1:-1] = inputs[:, 1:] == 0
    x = encoder_layers(decoder["unimodal"], x, heads, blocked, bias=False)
    texts = linear(params["text_projection"], norm(decoder["text_norm"], x[:, -1]))
    pooled = pool(params["image_pooling"], tokens, heads)[:, 0]
    pictures = linear(params["image_projection"], pooled)
    context = pool(decoder["pooling"], tokens, heads) if "pooling" in decoder else tokens
    x = decoder_layers(decoder["blocks"], x[:, :-1], context, blocked[:, :-1, :-1], heads)
    logits = linear(decoder["logits"], norm(decoder["norm"], x))
    return logits, F.normalize(pictures, dim=-1), F.normalize(texts, dim=-1)


def aim(
    params: dict, images: np.ndarray, text: np.ndarray, prefix: np.ndarray, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return AIMv2's tokens [B, N, D], predicted patches [B, N, P] and logits [B, T, V].

    The decoder reads one sequence: all tokens of the image, then the text.
    """
    decoder, (count, length) = params["decoder"], text.shape
    patches = len(params["encoder"]["positions"])
    later = torch.ones(patches, patches, dtype=torch.bool).triu(1).repeat(count, 1, 1)
    shared = torch.arange(patches) < tensor(prefix)[:, None]
    tokens, _ = vit(params["encoder"], images, heads, blocked=later & ~shared[:, None])
    inputs = tensor(text).long().roll(1, dims=1)
    inputs[:, 0] = 0
    read = tensor(decoder["embedding"]["embedding"])[inputs] + tensor(params["text_positions"])
    x = torch.cat([linear(decoder["connector"], tokens), read], dim=1)
    whole = patches + length
    blocked = torch.ones(whole, whole, dtype=torch.bool).triu(1).repeat(count, 1, 1)
    x = norm(decoder["norm"], encoder_layers(decoder["blocks"], x, heads, blocked, bias=False))
    predicted, logits = x[:, :patches], x[:, patches:]
    return tokens, linear(decoder["pixels"], predicted), linear(decoder["logits"], logits)


def prototypes(params: dict, x: torch.Tensor) -> torch.Tensor:
    """Return the cosines [..., K] of features [..., D] with prototypes, as in DINO's head."""
    for name in ("layer1", "layer2"):
        x = gelu(linear(params[name], x))
    x = F.normalize(linear(params["layer3"], x), dim=-1)
    return x @ F.normalize(tensor(params["prototypes"]["kernel"]), dim=0)


def text_tower(params: dict, text: np.ndarray, heads: int) -> torch.Tensor:
    """Encode text int [B, T] as [B, D], read at the last position."""
    x = tensor(params["embedding"]["embedding"])[tensor(text).long()] + tensor(params["positions"])
    return norm(params["norm"], encoder_layers(params["blocks"], x, heads))[:, -1]


def dual_encoder(
    params: dict, images: np.ndarray, text: np.ndarray, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return unit vectors of images and texts, [B, D] each, and their logits [B, B]."""
    _, pooled = vit(params["encoder"], images, heads)
    z_image = F.normalize(linear(params["image_projection"], pooled), dim=-1)
    read = text_tower(params["text_tower"], text, heads)
    z_text = F.normalize(linear(params["text_projection"], read), dim=-1)
    logits = z_image @ z_text.T * tensor(params["log_scale"]).exp()
    return z_image, z_text, logits + tensor(params["bias"]) if "bias" in params else logits
