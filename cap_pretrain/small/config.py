"""The config of a small run; `configs/small.py` documents its arguments."""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.learners import objectives
from cap_pretrain.learners.protocols import EmbedsText, WritesCaptions
from cap_pretrain.small import facts, rules
from cap_pretrain.telemetry import console

OBJECTIVES = ("cap", "cappa", "clip", "siglip", "coca")
"""Names of `learners.objectives` whose settings `rules` chooses, alone or joined by +."""


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `data=…,objective=…,devices=…`; say the choices.

    Raises UserError if the arguments or the dataset do not fit.
    """
    args = config.arguments(arg, data="scenes", objective="cap", devices="auto")
    check_objective(args.objective)
    devices = facts.devices_of(args.devices)
    measured = facts.measure(args.data)
    made, lines = resolve(args.data, args.objective, measured, devices)
    console.say("\n".join([f"Settings for {args.data} on {devices}:", *lines]))
    return made


def check_objective(objective: str) -> None:
    """Raise UserError unless an objective is one of OBJECTIVES, or several joined by +."""
    names = objective.split("+")
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(
                f"objective: {name!r} is none of {', '.join(OBJECTIVES)}, which may be joined by +."
                f"{did_you_mean(name, OBJECTIVES)}"
            )
    if len(set(names)) < len(names):
        raise UserError(f"objective: {objective!r} names one twice; name it once.")


def resolve(
    data: str, objective: str, measured: rules.Facts, devices: rules.Devices
) -> tuple[ConfigDict, list[str]]:
    """Return the config for a dataset with these facts, and the lines that explain it."""
    c = config.default()
    c.data.name = data
    c.learner = objectives.section(objective)
    for section in c.learner.parts.values() if c.learner.name == "joint" else [c.learner]:
        if section.get("parallel_fraction", 0):
            section.parallel_fraction = rules.PARALLEL
    unigram = c.learner.name == "captioner"  # other losses are not of captions alone
    c.evals = ConfigDict({"val": evals.defaults("loss", unigram=unigram)})
    if learners.able(c, WritesCaptions):
        c.evals.samples = evals.defaults("captions", count=8, shown=3)
    contrasts = learners.able(c, EmbedsText)
    if contrasts:
        c.evals.retrieval = evals.defaults("retrieval", when="end")
    choices = rules.choose(measured, devices, objective)
    for choice in choices:
        c.update_from_flattened_dict(choice.fields)
    if contrasts:  # its loss depends on the batch
        c.evals.val.batch_size = c.batch_size
    return c, [f"  {choice.line}" for choice in choices]
