"""Measures beam search with the cache against `transformers.generate` on a decoder of its size.

    python tools/bench_generate.py --model S/16 --batch_size 8 --beams 4 --length 32

Both decoders attend to as many encoder tokens and have the same width, depth, heads, hidden units
and vocabulary. Hugging Face's is MBart's, which has cross-attention and, like ours, norms before
its layers. Weights are random and no caption ends, so that both take all steps. They take turns in
every round, in float32 on the same cores of the CPU; the medians are printed. Encoder, compilation
and a first run of each are not in the times.

On a machine that is busy with other things, torch on several cores suffers more than it should:
OpenMP waits for each of its threads at every operation. --threads 1 compares one core with one.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from cap_pretrain.errors import UserError
from cap_pretrain.models.sizes import Size, parse_name

Generate = Callable[[], tuple[int, ...]]


def ours(size: Size, encoded: Any, args: argparse.Namespace) -> Generate:
    """Returns what runs our beam search once, and gives the shape of the captions."""
    import jax
    from flax import nnx

    from cap_pretrain.models.decoding import beam_search
    from cap_pretrain.models.layers import Compute
    from cap_pretrain.models.text import Decoder
    from cap_pretrain.training.step import split_learner

    decoder = Decoder(size, vocab_size=args.vocab_size, compute=Compute(), rngs=nnx.Rngs(0))
    graphdef, params, stats = split_learner(decoder)
    key = jax.random.key(0)
    kernel = params["logits"]["kernel"]  # zero at first
    params["logits"]["kernel"] = jax.random.normal(key, kernel.shape) * size.width**-0.5
    positions = jax.random.normal(key, (args.length, size.width)) * size.width**-0.5

    @jax.jit
    def generate(params, positions, encoded):
        decoder = nnx.merge(graphdef, params, stats)
        return beam_search(
            lambda tokens, position, cache: decoder.step(tokens, position, positions, cache),
            decoder.init_cache(encoded, args.length, args.beams),
            beams=args.beams,
            batch=len(encoded),
            length=args.length,
            start=0,
            eos=-1,
        )

    inputs = params, positions, jax.numpy.asarray(encoded)
    return lambda: generate(*inputs).block_until_ready().shape


def hugging_face(size: Size, encoded: Any, args: argparse.Namespace) -> Generate:
    """Returns what runs `transformers.generate` once, and gives the shape of the captions."""
    import torch
    from transformers import MBartConfig, MBartForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput

    torch.set_num_threads(args.threads)
    shape = dict(ffn_dim=size.mlp, attention_heads=size.heads)
    config = MBartConfig(
        vocab_size=args.vocab_size,
        d_model=size.width,
        encoder_layers=1,  # not run: it is given what an encoder would give
        decoder_layers=size.depth,
        **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in shape.items()},
        max_position_embeddings=args.length + 1,
        activation_function="gelu_new",  # the one with tanh
        decoder_start_token_id=0,
        eos_token_id=None,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    model = MBartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    tokens = torch.from_numpy(encoded)

    def generate() -> tuple[int, ...]:
        output = BaseModelOutput(last_hidden_state=tokens)  # which `generate` repeats in place
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
    """Returns the median seconds of each candidate; they take turns in every round.

    Raises:
      RuntimeError: one of them does not write captions of this shape.
    """
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
    """Returns the exit code: 0 done, 2 the user's mistake."""
    args = _parse(argv)
    cores = sorted(os.sched_getaffinity(0))
    args.threads = args.threads or len(cores)
    try:
        size, _ = parse_name(args.model)
        if not 0 < args.threads <= len(cores):
            raise UserError(f"--threads: {args.threads} is not in 1 to {len(cores)}, the cores.")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.sched_setaffinity(0, cores[: args.threads])  # before anybody makes threads
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
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="S/16", help="size of the decoder; default: S/16")
    parser.add_argument("--depth", type=int, help="its layers; default: half the encoder's")
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=196, help="of the encoder; default: 196")
    parser.add_argument("--batch_size", type=int, default=8, help="images")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--length", type=int, default=32, help="tokens of each caption")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="cores to use; default: all there are")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
