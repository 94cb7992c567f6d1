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

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain.checkpoint import Damaged, load_arrays, saved_steps
from cap_pretrain.convert import card, export
from cap_pretrain.convert.weights import read_json
from cap_pretrain.errors import UserError
from cap_pretrain.inputs import TOKENIZER_FILE

DUAL = "siglip"  # folder of the SiglipModel


def run_config(workdir: Path) -> ConfigDict:
    """The config of a run; what was no field yet when it ran has its default.

    Raises:
      UserError: there is none to be read.
    """
    stored = read_json(workdir / "config.json")
    config = configs.default()
    with config.unlocked():
        config.learner = ConfigDict(stored.pop("learner"))
        config.update(stored)
    return config


def load_params(workdir: Path, step: int | None) -> tuple[int, dict[str, np.ndarray], bool]:
    """Returns (step, parameters of the learner by path, whether they are averaged ones).

    Args:
      workdir: of the run.
      step: which checkpoint; None takes the newest that is sound, and tells of others.

    Raises:
      UserError: there is none, or the one asked for is damaged.
    """
    steps = saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        asked = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        there = f"there are {', '.join(map(str, steps))}" if steps else "it is no folder of a run"
        raise UserError(f"{workdir}: there is {asked}; {there}.")
    for candidate in [step] if step is not None else reversed(steps):
        try:
            arrays = load_arrays(workdir, candidate)
        except Damaged as e:
            print(f"{e}, and is passed over.", file=sys.stderr)
            continue
        averaged = any(path.startswith("learner/ema/") for path in arrays)
        prefix = "learner/ema/" if averaged else "learner/params/"
        params = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        return candidate, params, averaged
    raise UserError(f"{workdir}: no sound checkpoint; train further, or choose another --step.")


def write(workdir: Path, step: int | None, out: Path) -> str:
    """Writes the folder `out`, in whole or not at all; returns what to tell.

    Raises:
      UserError: there is nothing to be exported, or `out` is there already.
    """
    config = run_config(workdir)
    step, params, averaged = load_params(workdir, step)
    encoder = {k.removeprefix("encoder/"): v for k, v in params.items() if k.startswith("encoder/")}
    left_out = export.why_not_whole(config)
    with complete_or_not_there(out) as folder:
        export.write_vision_model(folder, config, encoder)
        if not left_out:
            tokenizer = (workdir / TOKENIZER_FILE).read_bytes()
            export.write_dual_encoder(folder / DUAL, config, params, tokenizer)
        card.write_card(
            folder / "README.md",
            config,
            step=step,
            parameters=sum(array.size for array in encoder.values()),
            averaged=averaged,
            evaluations=card.read_evaluations(workdir, step),
            dual="" if left_out else DUAL,
            left_out=left_out,
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
