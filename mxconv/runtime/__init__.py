"""The runtime: the original model's math in plain torch, over checkpoints and artifacts, as the judge of every conversion."""

from mxconv.runtime.cache import Cache
from mxconv.runtime.decoder import Decoder
from mxconv.runtime.generate import generate
from mxconv.runtime.loader import Weights
from mxconv.runtime.model import Model, load
from mxconv.runtime.opening import open_weights

__all__ = ["Cache", "Decoder", "Model", "Weights", "generate", "load", "open_weights"]
