"""Model configurations; the maths lives in `jaxattn.nn`."""

from jaxattn.models.config import ModelConfig, at_context

__all__ = ["ModelConfig", "at_context"]
