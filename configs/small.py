"""Train on your own captioned images: settings follow from the data and the devices.

python -m cap_pretrain.main --config=configs/small.py:data=data/my_data --workdir=runs/my_data

Image size, model, text length, vocabulary, batch, length, optimizer, augmentation and evaluation
follow from the size of the dataset and the devices. Each choice is printed with its reason, and
`--config.some.field=value` replaces it. For 200 to 100,000 captioned images on a laptop or one GPU;
`configs/pretrain.py` has the recipe for millions. cap_pretrain/small/rules.py holds the rules.

Arguments:
  data       dataset, or a mixture; default: scenes
  objective  cap, cappa, clip, siglip or coca, or several joined by +; default: cap
  devices    cpu-CORES, gpu-NUMBER or tpu-NUMBER; default: those of this machine. Give those that
             are printed at the start to continue a run on another machine.
"""

from cap_pretrain.small.config import get_config

__all__ = ["get_config"]
