"""The Python interface: `cap_pretrain.load` and `cap_pretrain.train`; see docs/python.md."""

from cap_pretrain.api.loading import load
from cap_pretrain.api.model import Attention, Classified, Model
from cap_pretrain.api.training import Trained, train

__all__ = ["Attention", "Classified", "Model", "Trained", "load", "train"]
