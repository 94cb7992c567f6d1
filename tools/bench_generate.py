"""Compare cached beam search with `transformers.generate` on a decoder of the same size.

    python tools/bench_generate.py --model S/16 --batch_size 8 --beams 4 --length 32

Both decoders have the same width, depth, heads, hidden units, vocabulary and encoder tokens.
Hugging Face's is MBart's, which has cross-attention and, like ours, layer norm before its layers.
Weights are random and no caption ends, so both take all steps. They alternate, in float32 on the
same CPU cores; medians exclude the encoder, compilation and a first run. --threads 1 is fairer on a
busy machine, where torch is slowed because OpenMP waits for each of its threads at every operation.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError
from cap_pretrain.models.sizes import Size, parse_name

Generate = Callable[[], tuple[int, ...]]


def ours(size: Size, encoded: Any, args: argparse.Namespace) -> Generate:
    """Return a function that runs our beam search once and returns the shape of the captions."""
    import jax
    from flax import nnx

    from cap_pretrain.models.decoding import CaptionSpec, beam_search
    from cap_pretrain.models.layers import Compute
    from cap_pretrain.models.text import Decoder
    from cap_pretrain.training.step import split_learner

    decoder = Decoder(size, vocab_size=args.vocab_size, compute=Compute(), rngs=nnx.Rngs(0))
    graphdef, params, stats = split_learner(decoder)
    key = jax.random.key(0)
    kernel = params["logits"]["kernel"]  # initialized to zero
    params["logits"]["kernel"] = jax.random.normal(key, kernel.shape) * size.width**-0.5
    positions = jax.random.normal(key, (args.length, size.width)) * size.width**-0.5

    @jax.jit
    def generate(params, positions, encoded):
        decoder = nnx.merge(graphdef, params, stats)
        return beam_search(
            lambda tokens, position, cache: decoder.step(tokens, position, positions, cache),
            decoder.init_cache(encoded, args.length, args.beams),
            CaptionSpec(batch=len(encoded), length=args.length, start=0, eos=-1),
            beams=args.beams,
        )

    inputs = params, positions, jax.numpy.asarray(encoded)
    return lambda: generate(*inputs).block_until_ready().shape


def hugging_face(size: Size, encoded: Any, args: argparse.Namespace) -> Generate:
    """Return a function that runs `transformers.generate` once and returns the captions' shape."""
    import torch
    from transformers import MBartConfig, MBartForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput

    torch.set_num_threads(args.threads)
    shape = dict(ffn_dim=size.mlp, attention_heads=size.heads)
    config = MBartConfig(
        vocab_size=args.vocab_size,
        d_model=size.width,
        encoder_layers=1,  # not run: the encoder's output is given
        decoder_layers=size.depth,
        **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in shape.items()},
        max_position_embeddings=args.length + 1,
        activation_function="gelu_new",  # GELU with tanh
        decoder_start_token_id=0,
        eos_token_id=None,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.from_numpy(encoded)

    def generate() -> tuple[int, ...]:
        output = BaseModelOutput(last_hidden_state=tokens)  # `generate` repeats it in place
        with torch.inference_mode():
            captions = model.generate(
                encoder_outputs=output,
                num_beams=args.beams,
                max_new_tokens=args.length,
                do_sample=False,
                use_cache=True,
            )
        return tuple(captions[:, 1:].shape)  # without the start token

    return generate


def measure(candidates: dict[str, Generate], shape: tuple[int, ...], rounds: int) -> dict:
    """Return median seconds by candidate; raises RuntimeError for captions of another shape."""
    for name, generate in candidates.items():
        if generate() != shape:
            raise RuntimeError(f"{name} did not write captions of shape {shape}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, generate in candidates.items():
            start = time.perf_counter()
            generate()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    return arguments.run(_run, _parse(argv), catch=(UserError,))


def _run(args: argparse.Namespace) -> int:
    cores = sorted(os.sched_getaffinity(0))
    args.threads = args.threads or len(cores)
    size, _ = parse_name(args.model)
    if not 0 < args.threads <= len(cores):
        raise UserError(f"--threads: {args.threads} is not in 1 to {len(cores)}, the cores.")
    os.sched_setaffinity(0, cores[: args.threads])  # before a library starts threads
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np

    size = Size(size.width, args.depth or max(1, size.depth // 2), size.mlp, size.heads)
    rng = np.random.default_rng(0)
    encoded = rng.standard_normal((args.batch_size, args.tokens, size.width)).astype(np.float32)
    candidates = {
        "cap_pretrain": ours(size, encoded, args),
        "transformers.generate": hugging_face(size, encoded, args),
    }
    shape = (args.batch_size, args.length)
    print(
        f"decoder {size}, {args.vocab_size} tokens, {args.batch_size} images of {args.tokens} "
        f"tokens, {args.beams} beams, captions of {args.length}; threads: {args.threads}"
    )
    seconds = measure(candidates, shape, args.rounds)
    slowest = seconds["transformers.generate"]
    print("\n| beam search | s | tokens/s | ratio |\n|---|---|---|---|")
    for name, median in seconds.items():
        rate = args.batch_size * args.length / median
        print(f"| {name} | {median:.4g} | {rate:.0f} | {slowest / median:.2f} |")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--model", default="S/16", help="size of the decoder; default: S/16")
    parser.add_argument("--depth", type=int, help="decoder layers; default: half the encoder's")
    parser.add_argument("--vocab_size", type=int, default=8000, help="default: 8000")
    parser.add_argument("--tokens", type=int, default=196, help="encoder tokens; default: 196")
    parser.add_argument("--batch_size", type=int, default=8, help="images; default: 8")
    parser.add_argument("--beams", type=int, default=4, help="default: 4")
    parser.add_argument("--length", type=int, default=32, help="tokens per caption; default: 32")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, help="CPU cores; default: all")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
