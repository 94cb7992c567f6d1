from cap_pretrain.api import Model as Model
from cap_pretrain.api import load as load
from cap_pretrain.api import train as train
from cap_pretrain.errors import UserError as UserError

__version__: str
__all__ = ["Model", "UserError", "__version__", "load", "train"]
