"""Cap, CapPa, CLIP and SigLIP in plain PyTorch, to compare our training step with.

The models have the parameters of ours, none more or less, and compute the same loss, so that
`load` can copy ours into them. They are written as is usual in PyTorch: joint projections for
queries, keys and values, `scaled_dot_product_attention`, fused AdamW, autocast to bfloat16 and
TF32 on GPUs. `tools/bench_step.py` runs them; importing this module needs torch.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap_pretrain.models.sizes import Size

EPSILON = 1e-6  # of every layer normalization
PAD = 0  # the padding token, which also starts a caption


class Shape(NamedTuple):
    """What a model is built from. `text` is the caption decoder, or the text tower."""

    objective: str  # cap, clip or siglip; cap with `parallel` is CapPa
    encoder: Size
    text: Size
    patch: int
    side: int  # of the images, in pixels
    vocab_size: int
    length: int  # of the texts, in tokens
    parallel: float = 0.0  # probability of parallel prediction
    pool: str = "gap"  # or map


def norm(width: int, bias: bool = True) -> nn.LayerNorm:
    """Return a layer normalization."""
    return nn.LayerNorm(width, eps=EPSILON, bias=bias)


class Attention(nn.Module):
    """Self-attention, or attention to a context of width `context`."""

    def __init__(self, width: int, heads: int, *, bias: bool, context: int = 0):
        super().__init__()
        self.heads = heads
        if context:
            self.query = nn.Linear(width, width, bias=bias)
            self.key_value = nn.Linear(context, 2 * width, bias=bias)
        else:
            self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def _split(self, x: Tensor, parts: int) -> Sequence[Tensor]:
        """[B, N, parts * D] -> `parts` times [B, heads, N, D / heads]."""
        x = x.view(*x.shape[:2], parts, self.heads, -1)
        return x.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend from x [B, T, D] to itself or to context [B, S, E]; return [B, T, D]."""
        if context is None:
            query, key, value = self._split(self.query_key_value(x), 3)
        else:
            (query,) = self._split(self.query(x), 1)
            key, value = self._split(self.key_value(context), 2)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU, in its tanh approximation, between them."""

    def __init__(self, size: Size, *, bias: bool):
        super().__init__()
        self.up = nn.Linear(size.width, size.mlp, bias=bias)
        self.down = nn.Linear(size.mlp, size.width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP, with biases."""

    def __init__(self, size: Size):
        super().__init__()
        self.norm1, self.norm2 = norm(size.width), norm(size.width)
        self.attention = Attention(size.width, size.heads, bias=True)
        self.mlp = Mlp(size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, D] to [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    """Pre-norm self-attention, cross-attention and MLP, without biases."""

    def __init__(self, size: Size, context: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (norm(size.width, bias=False) for _ in range(3))
        self.self_attention = Attention(size.width, size.heads, bias=False)
        self.cross_attention = Attention(size.width, size.heads, bias=False, context=context)
        self.mlp = Mlp(size, bias=False)

    def forward(self, x: Tensor, encoded: Tensor, mask: Tensor | None) -> Tensor:
        """Map x [B, T, D] to [B, T, D]; the mask bool [B, 1, T, T] is causal if None."""
        x = x + self.self_attention(self.norm1(x), mask=mask, causal=mask is None)
        x = x + self.cross_attention(self.norm2(x), encoded)
        return x + self.mlp(self.norm3(x))


class MapHead(nn.Module):
    """Attention pooling by a learned query."""

    def __init__(self, size: Size):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, size.width) * size.width**-0.5)
        self.attention = Attention(size.width, size.heads, bias=True, context=size.width)
        self.norm, self.mlp = norm(size.width), Mlp(size, bias=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool tokens [B, N, D] to [B, D]."""
        x = self.attention(self.probe.expand(len(tokens), -1, -1), tokens)
        return (x + self.mlp(self.norm(x)))[:, 0]


class ViT(nn.Module):
    """A Vision Transformer without a class token."""

    def __init__(self, shape: Shape):
        super().__init__()
        size, self.patch = shape.encoder, shape.patch
        tokens = (shape.side // shape.patch) ** 2
        self.patch_embedding = nn.Linear(3 * shape.patch**2, size.width)
        self.positions = nn.Parameter(torch.randn(tokens, size.width) * size.width**-0.5)
        self.blocks = nn.ModuleList(EncoderBlock(size) for _ in range(size.depth))
        self.norm = norm(size.width)
        self.head = MapHead(size) if shape.pool == "map" else None

    def forward(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B, H, W, 3] as tokens [B, N, D]."""
        x = images.float() / 127.5 - 1
        b, h, w, c = x.shape
        x = x.view(b, h // self.patch, self.patch, w // self.patch, self.patch, c)
        x = self.patch_embedding(x.transpose(2, 3).reshape(b, -1, c * self.patch**2))
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def pooled(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B, H, W, 3] as vectors [B, D]."""
        tokens = self(images)
        return tokens.mean(1) if self.head is None else self.head(tokens)


class Decoder(nn.Module):
    """A caption decoder; the last row of its embedding is the mask token."""

    def __init__(self, shape: Shape):
        super().__init__()
        size = shape.text
        self.embedding = nn.Embedding(shape.vocab_size + 1, size.width)
        self.blocks = nn.ModuleList(
            DecoderBlock(size, shape.encoder.width) for _ in range(size.depth)
        )
        self.norm = norm(size.width, bias=False)
        self.logits = nn.Linear(size.width, shape.vocab_size)

    def forward(
        self, inputs: Tensor, positions: Tensor, encoded: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the last hidden states [B, T, D] of inputs int64 [B, T]."""
        x = self.embedding(inputs) + positions
        for block in self.blocks:
            x = block(x, encoded, mask)
        return x

    def losses(self, states: Tensor, text: Tensor) -> Tensor:
        """Return the cross-entropy [B, T] of text int64 [B, T], 0 for padding."""
        logits = self.logits(self.norm(states)).flatten(0, 1)
        losses = F.cross_entropy(logits, text.flatten(), ignore_index=PAD, reduction="none")
        return losses.view(text.shape)


class Captioner(nn.Module):
    """Cap, or CapPa if some captions are predicted in parallel."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.encoder, self.decoder = ViT(shape), Decoder(shape)
        width = shape.text.width
        self.text_positions = nn.Parameter(torch.randn(shape.length, width) * width**-0.5)
        self.parallel, self.mask_token = shape.parallel, shape.vocab_size

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Return the loss of text int64 [B, T], averaged by caption, then over captions."""
        inputs, mask = F.pad(text, (1, 0), value=PAD)[:, :-1], None
        if self.parallel:
            parallel = torch.rand(len(text), device=text.device) < self.parallel
            inputs = torch.where(parallel[:, None], self.mask_token, inputs)
            length = text.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=text.device).tril()
            mask = causal | parallel[:, None, None, None]
        states = self.decoder(inputs, self.text_positions, self.encoder(images), mask)
        return (self.decoder.losses(states, text).sum(1) / (text != PAD).sum(1)).mean()


class TextTower(nn.Module):
    """A bidirectional text encoder, read at the last position."""

    def __init__(self, shape: Shape):
        super().__init__()
        size = shape.text
        self.embedding = nn.Embedding(shape.vocab_size, size.width)
        self.positions = nn.Parameter(torch.randn(shape.length, size.width) * size.width**-0.5)
        self.blocks = nn.ModuleList(EncoderBlock(size) for _ in range(size.depth))
        self.norm = norm(size.width)

    def forward(self, text: Tensor) -> Tensor:
        """Encode text int64 [B, T] as vectors [B, D]."""
        x = self.embedding(text) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, -1]


class DualEncoder(nn.Module):
    """CLIP, or SigLIP."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.text.width
        self.encoder, self.text_tower = ViT(shape), TextTower(shape)
        self.image_projection = nn.Linear(shape.encoder.width, width)
        self.text_projection = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(np.log(10, dtype=np.float32)))
        self.bias = nn.Parameter(torch.tensor(-10.0)) if shape.objective == "siglip" else None

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """Return the loss over all pairs of images and texts, by example."""
        z_image = self.image_projection(self.encoder.pooled(images))
        z_text = self.text_projection(self.text_tower(text))
        with torch.autocast(images.device.type, enabled=False):
            z_image, z_text = (F.normalize(z.float(), dim=-1) for z in (z_image, z_text))
            logits = self.log_scale.exp() * z_image @ z_text.T
            if self.bias is None:
                own = torch.arange(len(logits), device=logits.device)
                return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            sign = 2 * torch.eye(len(logits), device=logits.device) - 1
            return -F.logsigmoid(sign * (logits + self.bias)).sum() / len(logits)


def build(shape: Shape) -> nn.Module:
    """Return the model of a shape, in float32."""
    return Captioner(shape) if shape.objective == "cap" else DualEncoder(shape)


def compile_parts(model: nn.Module) -> None:
    """Let torch.compile compile the model by parts, once for all blocks of a kind.

    PyTorch's documentation recommends this ("regional compilation") for models of equal layers.
    """
    for module in model.modules():
        if isinstance(module, (EncoderBlock, DecoderBlock)):
            module.compile(dynamic=False)
        elif isinstance(module, Decoder):
            module.losses = torch.compile(module.losses)


def make_step(
    model: nn.Module, images: Tensor, text: Tensor, *, clip_norm: float, weight_decay: float
) -> Callable[[], Tensor]:
    """Return a training step on a batch that is on the model's device; it returns the loss.

    The optimizer is fused AdamW, with weight decay for the weights of linear layers only.
    """
    device = images.device.type
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups = [
        {
            "params": [p for p in model.parameters() if (id(p) in kernels) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)

    def step() -> Tensor:
        autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else _nothing()
        with autocast:
            loss = model(images, text)
        loss.backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _nothing() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


# Ours -> the name here: joint projections, and the parts of linear layers and normalizations.
_JOINT = (("query_key_value", ("query", "key", "value")), ("key_value", ("key", "value")))
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def load(model: nn.Module, params: Mapping[str, Any]) -> None:
    """Copy our parameters, a nested dict as a learner splits into, to a model of the same shape."""
    state = {}
    for name, parameter in model.state_dict().items():
        path = [int(p) if p.isdigit() else p for p in name.split(".")]
        array = np.concatenate(_found(params, path), axis=-1)
        if len(path) > 1 and path[-1] == "weight" and array.ndim == 2 and path[-2] != "embedding":
            array = array.T
        state[name] = torch.from_numpy(np.array(array)).reshape(parameter.shape)
    model.load_state_dict(state, strict=True)


def _found(params: Any, path: list[str | int]) -> list[np.ndarray]:
    """Return the arrays of ours that make up the parameter at a path, at least one-dimensional."""
    layer = next((part for part in path if isinstance(part, int)), None)
    names = [part for part in path if isinstance(part, str)]
    parts = next((ours for joint, ours in _JOINT if joint in names), None)
    found = []
    for part in parts or ("",):
        tree = params
        for name in names:
            name = part if parts and name in dict(_JOINT) else name
            if name == "weight":
                name = next(k for k in _LEAVES if k in tree)
            tree = tree[name]
        array = np.asarray(tree if layer is None else tree[layer])
        found.append(np.atleast_1d(array))
    return found
