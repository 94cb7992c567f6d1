"""Train recurrent captioners with published recipes, as baselines of captioning.

python -m cap_pretrain.main --workdir=runs/show_attend_tell \
    --config=configs/recurrent.py:recipe=show_attend_tell,data=data/coco
python -m cap_pretrain.main --workdir=runs/gru \
    --config=configs/recurrent.py:decoder=gru,encoder=runs/cappa,data=data/coco

Arguments:
  recipe   one of the recipes below, which sets everything; the other arguments override it;
           default: the first recipe of the decoder
  decoder  lstm, gru, attention or merge; default: that of the recipe, or lstm
  encoder  an architecture, trained with the decoder from random weights; or the PATH of a
           pretrained encoder (see `config.encoder`), which is frozen as in the sources; or
           "stored", if `data` holds features of a frozen encoder (see tools/extract_features.py),
           so that training does not decode or encode images, as in the sources of `merge`;
           default: that of the recipe
  data     dataset; default: scenes

To train a pretrained encoder too, use `--config.encoder=PATH` instead. The public code of Show,
Attend and Tell fine-tunes the last three stages of a ResNet at 1e-4:
    --config.optim.lr_rules="(('encoder/(stem|stage_1)/.*', 0.0), ('encoder/.*', 0.25))"

| recipe | source | published encoder |
|---|---|---|
| cnn_lstm | Vinyals et al. 2015 (1411.4555), on VizWiz | ResNet-50, supervised |
| gru | the image as the initial state of a GRU, on COCO | ResNet-101, supervised |
| show_attend_tell | Xu et al. 2015 (1502.03044), by its PyTorch tutorial, on COCO | ResNet-101 |
| merge | Tanti et al. 2017 (1708.02043), on Flickr8k | ResNet-50: SimCLR |
| merge_jigsaw | the same | ResNet-50: jigsaw |
| rotation_lstm | an LSTM on self-supervised features, on COCO | ResNet-50: rotation, others |
| clip_lstm | cnn_lstm on CLIP's pooled vector | CLIP ViT-B/32 |
| clip_attention | the decoder of show_attend_tell on CLIP's tokens | CLIP ViT-B/32 |

An epoch of the sources shows every caption once. Here it shows every image once (except with
`data.buckets`), so epochs are scaled by the five captions per image of COCO, Flickr8k and VizWiz.
Batch sizes that a source does not give are our choice: 64 for `gru` and `merge`, and 32 for
`show_attend_tell`, as in its public code.

The pooled vector of CLIP is the one before its projection to 512 dimensions; a linear layer of the
LSTM replaces the projection. Features stored with tools/extract_features.py --what head include
it. The same option stores the output of the whole jigsaw network for its nine tiles, the other
feature extractor of `merge_jigsaw`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.recurrent import DECODERS
from cap_pretrain.models.sizes import CONVNETS, STORED

CAPTIONS = 5.0  # captions per image in the sources' datasets

# Config fields of each architecture; those of CLIP are the ones that its checkpoints set.
ENCODERS: dict[str, dict[str, Any]] = {
    **{name: {"model.name": name} for name in CONVNETS},
    STORED: {"model.name": STORED, "data.crop": "none", "data.flip": False},
    "vit": {"model.name": "S/16"},
    "clip_vit_b32": {
        "model.name": "B/32",
        "model.pool": "class",
        "model.class_token": True,
        "model.pre_norm": True,
        "model.final_norm": "pooled",
        "model.activation": "quick_gelu",
        "model.norm_eps": 1e-5,
    },
}

# Learner options that only one decoder has.
DECODER_OF_OPTION = {"layers": "lstm", "grid": "attention", "penalty": "attention"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a source."""

    decoder: str
    encoder: str  # a key of ENCODERS
    epochs: int  # each showing every caption once
    best: str  # metric that selects the best checkpoint
    options: dict[str, Any]  # of the learner
    fields: dict[str, Any]  # of the config
    beams: tuple[int, ...] = ()  # widths of evaluations at the end, besides greedy decoding


MERGE = Recipe(
    decoder="merge",
    encoder="resnet50",
    epochs=20,
    best="val/loss",
    options=dict(embed=256, hidden=256, dropout=0.5),
    fields={
        "batch_size": 64,
        "text.length": 35,  # at most 34 words
        "text.words.drop_letters": True,
        "optim.lr": 1e-2,
        "optim.eps": 0.1,
    },
)
CNN_LSTM = Recipe(
    decoder="lstm",
    encoder="resnet50",
    epochs=5,
    best="scores/CIDEr",
    options=dict(layers=2),
    fields={"batch_size": 32, "text.words.min_count": 6, "optim.lr": 1e-3},
)
# The first recipe of each decoder is its default.
RECIPES = {
    "cnn_lstm": CNN_LSTM,
    "gru": Recipe(
        decoder="gru",
        encoder="resnet101",
        epochs=30,
        best="val/loss",
        options={},
        fields={"batch_size": 64, "data.image_size": 256, "optim.lr": 4e-4},
        beams=(3, 5),
    ),
    "show_attend_tell": Recipe(
        decoder="attention",
        encoder="resnet101",
        epochs=30,
        best="scores/Bleu_4",
        options=dict(grid=14, dropout=0.5, penalty=1.0),
        fields={
            "batch_size": 32,
            "data.image_size": 256,
            "text.words.min_count": 6,  # more than 5
            "optim.lr": 4e-4,
            "optim.clip_value": 5.0,
            "plateau.figure": "scores/Bleu_4",
            "plateau.mode": "max",
            "plateau.factor": 0.8,
            "plateau.patience": 8,
            "plateau.stop": 20,
        },
        beams=(3, 5),
    ),
    "merge": MERGE,
    "merge_jigsaw": dataclasses.replace(
        MERGE,
        epochs=25,
        fields=MERGE.fields
        | {
            "plateau.figure": "val/loss",
            "plateau.factor": 0.1,  # Keras's default, like the patience
            "plateau.patience": 10,
        },
    ),
    "rotation_lstm": Recipe(
        decoder="lstm",
        encoder="resnet50",
        epochs=10,
        best="val/loss",
        options={},
        fields={
            "batch_size": 64,
            "data.buckets": True,
            "data.crop": "window",
            "data.flip": True,
            "text.words.tokenization": "nltk",
            "text.words.min_count": 4,
            "optim.lr": 1e-3,
        },
    ),
    "clip_lstm": dataclasses.replace(CNN_LSTM, encoder="clip_vit_b32"),
    "clip_attention": dataclasses.replace(
        CNN_LSTM,
        decoder="attention",
        encoder="clip_vit_b32",
        options=dict(dropout=0.5, penalty=1.0),
        fields=CNN_LSTM.fields | {"optim.clip_value": 5.0},
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `decoder=…,encoder=…,data=…,recipe=…` (see the module's docstring)."""
    args = config.arguments(
        arg, decoder=("", *DECODERS), encoder="", data="scenes", recipe=("", *RECIPES)
    )
    recipe = RECIPES[args.recipe or first_of(args.decoder or "lstm")]
    encoder, pretrained = args.encoder or recipe.encoder, ""
    if encoder not in ENCODERS:
        encoder, pretrained = recipe.encoder, encoder
        # A path is read by the first start only, which says if it is missing.
        is_name = Path(pretrained).name == pretrained and not Path(pretrained).suffix
        if is_name and not Path(pretrained).exists():
            raise UserError(
                f"--config: encoder={pretrained!r} is neither an architecture nor an existing "
                f"path.{did_you_mean(pretrained, ENCODERS)}"
            )
    c = config.default()
    c.learner = learners.defaults("recurrent", **options(recipe, args.decoder or recipe.decoder))
    c.data.name = args.data
    if args.data == "scenes":  # it is endless, but the recipes count epochs
        c.data.scenes.length_train = 20_000
    c.text.kind = "words"
    c.text.length = 51  # at most 50 words
    c.optim.name = "adamw"
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 0.0
    c.optim.decay = "constant"
    c.optim.warmup_share = 0.0
    c.encoder = pretrained
    if pretrained:
        c.optim.lr_rules = (("encoder/.*", 0.0),)
    c.update_from_flattened_dict(recipe.fields | ENCODERS[encoder])
    epoch = 1.0 if c.data.buckets else CAPTIONS
    c.total_epochs = recipe.epochs * epoch
    c.eval.every_epochs = c.checkpoint.every_epochs = epoch
    c.checkpoint.best = recipe.best
    c.checkpoint.best_mode = "min" if recipe.best == "val/loss" else "max"
    c.evals = ConfigDict(
        {
            "val": evals.defaults("loss", unigram=True),
            "perplexity": evals.defaults("perplexity"),
            "scores": evals.defaults("caption_scores"),
            "samples": evals.defaults("captions"),
        }
    )
    for beams in recipe.beams:
        # The sources compare log-probabilities without length normalization.
        decoding = dict(method="beam", beams=beams, length_norm=0.0, when="end")
        c.evals[f"scores_beam_{beams}"] = evals.defaults("caption_scores", **decoding)
    return c


def first_of(decoder: str) -> str:
    """Return the name of the first recipe of a decoder."""
    return next(name for name, recipe in RECIPES.items() if recipe.decoder == decoder)


def options(recipe: Recipe, decoder: str) -> dict[str, Any]:
    """Return a recipe's learner options for a decoder, without options of other decoders."""
    kept = {
        name: value
        for name, value in recipe.options.items()
        if DECODER_OF_OPTION.get(name, decoder) == decoder
    }
    return {"decoder": decoder, **kept}
