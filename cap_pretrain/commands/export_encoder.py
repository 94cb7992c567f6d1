"""Export the encoder of a run as a folder that another library loads.

    cap export --checkpoint runs/cappa --out exported/cappa
    cap export --checkpoint runs/clip --layout open_clip --out exported/clip
    cap export --checkpoint runs/clip --to hub --repo OWNER/NAME --dry_run

The folder has weights (safetensors; averaged ones, if any), config files, preprocessing and a model
card (README.md) with the run's config and figures. For transformers it is a SiglipVisionModel; a
CLIP or SigLIP run is also written whole, with its tokenizer, to OUT/siglip, a SiglipModel, and
--config.encoder=OUT loads OUT. An imported CLIP is a CLIPVisionModel again, and whole in OUT/clip.
 --layout=open_clip writes such a run whole, --layout=timm a ViT.
"""

import argparse
import contextlib
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cap_pretrain import files
from cap_pretrain.checkpoints.load import read_config, read_weights
from cap_pretrain.checkpoints.open import run_at
from cap_pretrain.cli import arguments
from cap_pretrain.convert import huggingface, layouts, openai
from cap_pretrain.convert.layouts import card, hub
from cap_pretrain.errors import UserError
from cap_pretrain.inputs import BYTE_PAIRS_FILE, TOKENIZER_FILE
from cap_pretrain.telemetry.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Choice:
    """How an export is written.

    Attributes:
        layout: One of `layouts.LAYOUTS`.
        licence: Licence of the weights for the model card; "" leaves a note to fill in.
        place: What the files of the export call their place, see `layouts.Source`; "" is a folder.
    """

    layout: str = "transformers"
    licence: str = ""
    place: str = ""


def write(workdir: Path, step: int | None, out: Path, choice: Choice = Choice()) -> str:
    """Write the folder `out`, completely or not at all, and return a report.

    `step` None is the newest valid one. Raises UserError if nothing can be exported or `out`
    exists.
    """
    config = read_config(workdir)
    step, averaged, params, _ = read_weights(workdir, step)
    tokenizer, byte_pairs = (
        path.read_bytes() if path.exists() else None
        for path in (workdir / TOKENIZER_FILE, workdir / BYTE_PAIRS_FILE)
    )
    place = choice.place or f"local-dir:{out.name if files.is_url(out) else out.absolute()}"
    source = layouts.Source(config, params, tokenizer, place, byte_pairs)
    encoder = source.inside("encoder")
    with complete_or_not_there(out) as folder:
        written = layouts.write(choice.layout, folder, source)
        card.write_card(
            folder / "README.md",
            config,
            card.Exported(
                step=step,
                parameters=sum(array.size for array in encoder.values()),
                averaged=averaged,
                evaluations=card.read_evaluations(workdir, step),
                figures=_figures(workdir, step),
                written=written,
                licence=choice.licence,
            ),
        )
    kind = "averaged parameters" if averaged else "parameters"
    lines = [f"wrote {out}: {kind} of the {config.model.name} encoder at step {step}"]
    lines += [f"wrote {out}/{part}" for part in written.parts]
    return "\n".join(lines + [f"not included: {written.left_out}"] * bool(written.left_out))


def _figures(workdir: Path, step: int) -> dict[str, float | None]:
    """Return the last value of each figure up to a step."""
    found: dict[str, float | None] = {}
    for line in read_metrics(workdir):
        if line["step"] <= step:
            found |= {name: value for name, value in line.items() if name != "step"}
    return found


@contextlib.contextmanager
def complete_or_not_there(out: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `out` unless an exception is raised.

    In a bucket, the files that the readers of a folder look for come last.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {str(out)!r} already exists; name another folder, or remove it.")
    if files.is_url(out):
        with tempfile.TemporaryDirectory() as temporary:
            yield files.place(temporary)
            files.upload(files.place(temporary), out, (huggingface.CONFIG, openai.CONFIG))
        return
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
    to_hub = args.to == "hub"
    if to_hub != bool(args.repo):
        raise UserError("--repo: --to hub and --repo OWNER/NAME go together.")
    if not to_hub and not args.out:
        raise UserError("--out: is missing; name a folder to create, or give --to hub.")
    if to_hub:
        hub.check(args.repo, token=not args.dry_run)
    if to_hub and args.out and files.is_url(args.out):
        raise UserError(
            f"--out: {args.out} is a URL; with --to hub, give a folder or leave it out."
        )
    run = run_at(args.checkpoint, args.step)
    place = f"hf-hub:{args.repo}" if to_hub else ""
    choice = Choice(args.layout, args.licence, place)
    with tempfile.TemporaryDirectory() as temporary:
        kept = args.out and not args.dry_run
        out = (
            args.out if kept else files.place(temporary) / (args.out.name if args.out else "export")
        )
        with arguments.waiting(f"Exporting {args.checkpoint}"):
            report = write(run.workdir, run.step, out, choice)
        if args.dry_run:
            print(_planned(out, args))
            return 0
        print(report)
        if to_hub:
            print(f"uploaded {len(hub.listing(out))} files to {hub.upload(out, args.repo)}")
    return 0


def _planned(folder: Path, args: argparse.Namespace) -> str:
    """Return what an export would write or upload, one file a line."""
    listed = hub.listing(folder)
    verb = f"would upload to the hub as {args.repo}" if args.repo else f"would write {args.out}"
    lines = [f"{verb}: {len(listed)} files, {sum(size for _, size in listed):,} bytes"]
    return "\n".join([*lines, *(f"  {name}  {size:,} bytes" for name, size in listed)])


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    arguments.add_checkpoint(parser)
    what = "folder to create, or gs://BUCKET/FOLDER"
    parser.add_argument("--out", type=arguments.run_path, help=what)
    kinds = "; ".join(f"{name}: {what}" for name, what in layouts.LAYOUTS.items())
    parser.add_argument(
        "--layout", default="transformers", choices=list(layouts.LAYOUTS), help=kinds
    )
    parser.add_argument("--licence", default="", help="licence of the weights for the model card")
    parser.add_argument("--to", default="folder", choices=["folder", "hub"], help="where to")
    parser.add_argument("--repo", default="", help="with --to hub: OWNER/NAME on the hub")
    parser.add_argument("--dry_run", action="store_true", help="only list what would be written")
    return arguments.run(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
