"""Hugging Face checkpoints in and out, and experts made of dense ones."""

from jaxrl_stable.hf.config import read_config
from jaxrl_stable.hf.load import load
from jaxrl_stable.hf.save import save
from jaxrl_stable.hf.upcycle import upcycle

__all__ = ["load", "read_config", "save", "upcycle"]
