"""Tune a text tower to a frozen encoder: LiT, locked-image text tuning.

python -m cap_pretrain.main --workdir=runs/lit \
    --config=configs/lit.py:encoder=runs/cappa,data=data/cc12m,zero_shot=data/imagenette

Arguments:
  encoder    PATH of a pretrained encoder (see `config.encoder`), which stays as it is; or
             "stored", if `data` holds features of one (see tools/extract_features.py), so that
             training does not decode or encode images; default: --config.encoder
  data       dataset with captions; default: scenes
  contrast   softmax, as in the paper, or sigmoid, as in SigLIP; default: softmax
  head       what becomes the vector of an image. map: attention pooling of all tokens, trained
             with the text tower; none: the encoder's pooled vector, as in the paper; linear: a
             linear projection of it, trained; default: map, since captioners do not train their
             pooled vector
  zero_shot  dataset with labels for zero-shot classification at the end; default: none, or scenes
             with data=scenes

Zhai et al. 2021 (2111.07991). The text tower begins at random and is of the encoder's width, depth
and heads if that is a ViT; else `--config.model.decoder_width=…` and so on set its size. A
tokenizer is trained on the captions of `data`; `--config.text.tokenizer=PATH` takes one, such as
that of the encoder's run. The encoder's gradient is not computed.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners

HEADS = ("map", "none", "linear")


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `encoder=…,data=…,contrast=…,head=…,zero_shot=…`."""
    args = config.arguments(
        arg,
        encoder="",
        data="scenes",
        contrast=("softmax", "sigmoid"),
        head=HEADS,
        zero_shot="",
    )
    c = config.default()
    c.total_epochs = 20.0
    c.batch_size = 1024
    c.data.name = args.data
    if args.data == "scenes":  # it is endless
        c.data.scenes.length_train = 20_000
    c.learner = learners.defaults("dual_encoder", contrast=args.contrast, head=args.head)
    if args.encoder == "stored":
        c.model.name = "stored"
    else:
        c.encoder = args.encoder
    c.optim.lr_rules = (("encoder/.*", 0.0),)
    c.evals = ConfigDict(
        {"val": evals.defaults("loss"), "retrieval": evals.defaults("retrieval", when="end")}
    )
    labelled = args.zero_shot or (args.data if args.data == "scenes" else "")
    if labelled:
        data = "" if labelled == args.data else labelled
        c.evals.zero_shot = evals.defaults("zero_shot", data=data, when="end")
    return c
