"""Hugging Face checkpoints in and out: `load`, `save`, and the architecture in `config.json`."""

from jaxrl_stable.hf.config import read_config
from jaxrl_stable.hf.load import load
from jaxrl_stable.hf.save import save

__all__ = ["load", "read_config", "save"]
