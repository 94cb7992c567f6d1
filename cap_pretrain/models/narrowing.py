"""The base model of muP (`optim.mup.base_width`): the same model with another width."""

from ml_collections import ConfigDict

from cap_pretrain.errors import UserError
from cap_pretrain.models.build import encoder_size, resnet_stages
from cap_pretrain.models.sizes import RESNETS, SIZES


def narrowed(config: ConfigDict) -> ConfigDict:
    """Return the config with the width of the base model, and all others in proportion.

    Those are the widths of MLPs, decoder and text tower, as far as they are given; by default the
    latter two follow a ViT, and do not depend on a ResNet. The base has one attention head, since
    heads do not change the shape of any parameter.

    Raises:
        UserError: Widths do not become whole numbers, or the model has no width or heads to scale.
    """
    base = config.copy_and_resolve_references()
    mup, name = config.optim.mup, config.model.name
    if name in RESNETS:
        if mup.base_heads:
            raise UserError(f"optim.mup.base_heads: model.name={name} has no heads; set it to 0.")
        width = resnet_stages(config).base
    elif name.partition("/")[0] in SIZES:
        size = encoder_size(config)
        width = size.width
        base.model.mlp = _scaled("model.mlp", size.mlp, mup.base_width, width)
        base.model.heads = base.model.decoder_heads = 1
    else:
        raise UserError(
            f"optim.mup.base_width: model.name={name} has no widths to scale; set it to 0."
        )
    base.model.width = mup.base_width
    parts = base.learner.get("parts") or {}
    sections = {f"learner.parts.{part}": own for part, own in parts.items()}
    for section, own in ({"model": base.model, "learner": base.learner} | sections).items():
        prefix = "decoder_" if section == "model" else "text_"
        for field in (f"{prefix}width", f"{prefix}mlp"):
            if own.get(field):
                own[field] = _scaled(f"{section}.{field}", own[field], mup.base_width, width)
        if own.get(f"{prefix}heads"):
            own[f"{prefix}heads"] = 1
    return base


def _scaled(field: str, value: int, base_width: int, width: int) -> int:
    if value * base_width % width:
        raise UserError(
            f"optim.mup.base_width: {base_width} of {width} is no whole number of "
            f"{field}={value}; choose another one."
        )
    return value * base_width // width
