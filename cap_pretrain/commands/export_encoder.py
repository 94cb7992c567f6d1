"""Export the encoder of a run as a folder that `transformers` loads as SiglipVisionModel.

    python tools/export_encoder.py --checkpoint runs/cappa --out exported/cappa

The folder has weights (safetensors; averaged ones, if any), config.json, preprocessor_config.json
and a model card (README.md) with the config and the metrics in evals/. A CLIP or SigLIP run is also
written whole, with its tokenizer, to OUT/siglip, a SiglipModel. --config.encoder=OUT loads OUT.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from cap_pretrain.checkpoints.load import read_config, read_weights
from cap_pretrain.checkpoints.open import run_at
from cap_pretrain.cli import arguments
from cap_pretrain.convert import card, export
from cap_pretrain.errors import UserError
from cap_pretrain.inputs import TOKENIZER_FILE

DUAL = "siglip"  # folder of the SiglipModel


def write(workdir: Path, step: int | None, out: Path) -> str:
    """Write the folder `out`, completely or not at all, and return a report.

    `step` None is the newest valid one. Raises UserError if nothing can be exported or `out`
    exists.
    """
    config = read_config(workdir)
    step, averaged, params, _ = read_weights(workdir, step)
    encoder = {k.removeprefix("encoder/"): v for k, v in params.items() if k.startswith("encoder/")}
    left_out = export.why_not_whole(config)
    if not left_out and not (workdir / TOKENIZER_FILE).exists():
        left_out = "the text tower, because transformers has no tokenizer of whole words"
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
    kind = "averaged parameters" if averaged else "parameters"
    report = f"wrote {out}: {kind} of the {config.model.name} encoder at step {step}"
    if left_out:
        return f"{report}\nnot included: {left_out}"
    return f"{report}\nwrote {out / DUAL}: the same with text tower and tokenizer"


@contextlib.contextmanager
def complete_or_not_there(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `out` unless an exception is raised."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {str(out)!r} already exists; name another folder, or remove it.")
    out = out.absolute()
    fresh = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        fresh.replace(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _run(args: argparse.Namespace) -> int:
    run = run_at(args.checkpoint, args.step)
    with arguments.waiting(f"Exporting {args.checkpoint}"):
        report = write(run.workdir, run.step, args.out)
    print(report)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    arguments.add_checkpoint(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    return arguments.run(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
