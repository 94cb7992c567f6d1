"""Writes the encoder of a run as a folder that `transformers` loads as SiglipVisionModel.

    python tools/export_encoder.py --checkpoint runs/cappa --out exported/cappa

The folder holds weights (safetensors), config.json, preprocessor_config.json and a model card
(README.md) with the training config and the figures of evals/. Parameters are the averaged ones
where the run averages them. What a CLIP or SigLIP has besides the encoder goes to OUT/siglip, which
loads as SiglipModel, with its tokenizer. --config.encoder=OUT takes the folder back.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cap_pretrain.checkpoints.load import read_config, read_weights
from cap_pretrain.convert import card, export
from cap_pretrain.errors import UserError
from cap_pretrain.inputs import TOKENIZER_FILE

DUAL = "siglip"  # folder of the SiglipModel


def write(workdir: Path, step: int | None, out: Path) -> str:
    """Writes the folder `out`, in whole or not at all; returns what to tell.

    Raises:
      UserError: there is nothing to be exported, or `out` is there already.
    """
    config = read_config(workdir)
    step, averaged, params, _ = read_weights(workdir, step)
    encoder = {k.removeprefix("encoder/"): v for k, v in params.items() if k.startswith("encoder/")}
    left_out = export.why_not_whole(config)
    if not left_out and not (workdir / TOKENIZER_FILE).exists():
        left_out = "what reads text, since transformers has no tokenizer of whole words"
    with complete_or_not_there(out) as folder:
        export.write_vision_model(folder, config, encoder)
        if not left_out:
            tokenizer = (workdir / TOKENIZER_FILE).read_bytes()
            export.write_dual_encoder(folder / DUAL, config, params, tokenizer)
        card.write_card(
            folder / "README.md",
            config,
            card.Exported(
                step=step,
                parameters=sum(array.size for array in encoder.values()),
                averaged=averaged,
                evaluations=card.read_evaluations(workdir, step),
                dual="" if left_out else DUAL,
                left_out=left_out,
            ),
        )
    of = "averaged parameters" if averaged else "parameters"
    told = f"wrote {out}: {of} of the {config.model.name} encoder at step {step}"
    if left_out:
        return f"{told}\nnot in it: {left_out}"
    return f"{told}\nwrote {out / DUAL}: the same with text tower and tokenizer"


@contextlib.contextmanager
def complete_or_not_there(out: Path) -> Iterator[Path]:
    """Gives a folder to write into that becomes `out` at the end, unless an exception comes."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {str(out)!r} is there already; name another folder, or remove it.")
    out = out.absolute()
    fresh = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        fresh.replace(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    args = _parse(argv)
    try:
        print(write(args.checkpoint, args.step, args.out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the workdir of a run")
    parser.add_argument("--out", type=Path, required=True, help="the folder to be made")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest sound one")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
