"""Loads and saves Hugging Face checkpoints, and upcycles dense ones to mixtures of experts."""

from jaxrl_stable.hf.config import read_config
from jaxrl_stable.hf.load import check, load
from jaxrl_stable.hf.save import save
from jaxrl_stable.hf.upcycle import upcycle

__all__ = ["check", "load", "read_config", "save", "upcycle"]
