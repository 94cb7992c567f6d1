"""Reference decoders from torch's recurrent layers."""

import numpy as np

from tests.models.test_recurrent import SIZES, TEXTS, WIDTH
from tests.torch_reference import F, linear, linear_state, load, nn, tensor, torch


def lstm_state(cell, more=None):
    """Return one layer under torch's names; `more`: kernels of further inputs."""
    kernels = [cell["input"]["kernel"], *(more or [])]
    return {
        "weight_ih": np.concatenate(kernels).T,
        "weight_hh": cell["recurrent"]["kernel"].T,
        "bias_ih": cell["input"]["bias"],
        "bias_hh": np.zeros_like(cell["input"]["bias"]),
    }


def torch_lstm(cells, width):
    state = {f"{k}_l{n}": v for n, cell in enumerate(cells) for k, v in lstm_state(cell).items()}
    return load(nn.LSTM(width, SIZES["hidden"], len(cells), batch_first=True), state)


def torch_decoder(options, p, seen, text):
    """Return logits [R, T, V] and attention weights [R, T, N] or None."""
    seen = tensor(seen).repeat_interleave(TEXTS, dim=0)
    x = tensor(p["embedding"]["embedding"])[tensor(text).long()]
    weights = None
    if options.decoder == "lstm":
        first = linear(p["image"], seen)
        lstm = torch_lstm([p["layers"][str(n)] for n in range(options.layers)], x.shape[-1])
        x = lstm(torch.cat([first[:, None], x], dim=1))[0][:, 1:]
    elif options.decoder == "gru":
        x = torch_gru(p["gru"], x, linear(p["image"], seen), options.reset)
    elif options.decoder == "merge":
        x = torch_lstm([p["lstm"]], x.shape[-1])(x)[0]
        x = F.relu(linear(p["merged"], x + F.relu(linear(p["image"], seen))[:, None]))
    else:
        x, weights = torch_attention(p, x, seen, options)
    return linear(p["logits"], x), weights


def torch_gru(p, x, h, reset):
    if reset == "after":
        state = {
            "weight_ih_l0": p["input"]["kernel"].T,
            "weight_hh_l0": np.concatenate(
                [p["recurrent"]["kernel"], p["candidate"]["kernel"]], 1
            ).T,
            "bias_ih_l0": p["input"]["bias"],
            "bias_hh_l0": np.concatenate([np.zeros(2 * len(h[0])), p["candidate"]["bias"]]),
        }
        return load(nn.GRU(x.shape[-1], h.shape[-1], batch_first=True), state)(x, h[None])[0]
    outputs = []
    recurrent, candidate = (tensor(p[name]["kernel"]) for name in ("recurrent", "candidate"))
    for now in linear(p["input"], x).unbind(1):
        r, z, n = now.chunk(3, dim=-1)
        more_r, more_z = (h @ recurrent).chunk(2, dim=-1)
        r, z = torch.sigmoid(r + more_r), torch.sigmoid(z + more_z)
        h = (1 - z) * torch.tanh(n + (r * h) @ candidate) + z * h
        outputs.append(h)
    return torch.stack(outputs, 1)


def torch_attention(p, x, parts, options):
    if options.grid:
        grid = parts.reshape(len(parts), 2, 2, -1).permute(0, 3, 1, 2)
        parts = F.adaptive_avg_pool2d(grid, options.grid).flatten(2).transpose(1, 2)
    size = SIZES["attention"]
    of_part = load(nn.Linear(WIDTH, size), linear_state("", p["key"]))
    of_state = load(nn.Linear(SIZES["hidden"], size), linear_state("", p["query"]))
    full = load(nn.Linear(size, 1, bias=False), linear_state("", p["score"]))
    cell = nn.LSTMCell(x.shape[-1] + WIDTH, SIZES["hidden"])
    load(cell, lstm_state(p["lstm"], [p["context"]["kernel"]]))
    h, c = linear(p["image"], parts.mean(1)).chunk(2, dim=-1)
    outputs, weights = [], []
    for word in x.unbind(1):
        scores = full(F.relu(of_part(parts) + of_state(h)[:, None]))[..., 0]
        weights.append(scores.softmax(-1))
        context = (weights[-1][..., None] * parts).sum(1)
        if options.gate:
            context = torch.sigmoid(linear(p["gate"], h)) * context
        h, c = cell(torch.cat([word, context], dim=-1), (h, c))
        outputs.append(h)
    return torch.stack(outputs, 1), torch.stack(weights, 1)
