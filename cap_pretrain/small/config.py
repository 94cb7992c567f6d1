"""The config of a small run; `configs/small.py` documents its arguments."""

from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.small import facts, rules
from cap_pretrain.telemetry import console

OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "cap": ("captioner", {"parallel_fraction": 0.0}),
    "cappa": ("captioner", {"parallel_fraction": rules.PARALLEL}),
    "clip": ("dual_encoder", {"contrast": "softmax"}),
    "siglip": ("dual_encoder", {"contrast": "sigmoid"}),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `data=…,objective=cap|cappa|clip|siglip,devices=…`; say the choices.

    Raises UserError if the arguments or the dataset do not fit.
    """
    args = config.arguments(arg, data="scenes", objective=tuple(OBJECTIVES), devices="auto")
    devices = facts.devices_of(args.devices)
    measured = facts.measure(args.data)
    made, lines = resolve(args.data, args.objective, measured, devices)
    console.say("\n".join([f"Settings for {args.data} on {devices}:", *lines]))
    return made


def resolve(
    data: str, objective: str, measured: rules.Facts, devices: rules.Devices
) -> tuple[ConfigDict, list[str]]:
    """Return the config for a dataset with these facts, and the lines that explain it."""
    learner, options = OBJECTIVES[objective]
    c = config.default()
    c.data.name = data
    c.learner = learners.defaults(learner, **options)
    captions = learner == "captioner"
    c.evals = ConfigDict({"val": evals.defaults("loss", unigram=captions)})
    if captions:
        c.evals.samples = evals.defaults("captions", count=8, shown=3)
    else:
        c.evals.retrieval = evals.defaults("retrieval", when="end")
    choices = rules.choose(measured, devices, objective)
    for choice in choices:
        c.update_from_flattened_dict(choice.fields)
    if not captions:  # its loss depends on the batch
        c.evals.val.batch_size = c.batch_size
    return c, [f"  {choice.line}" for choice in choices]
