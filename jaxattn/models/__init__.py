"""Model configurations; the maths lives in `jaxattn.nn`."""

from jaxattn.models.config import ModelConfig

__all__ = ["ModelConfig"]
