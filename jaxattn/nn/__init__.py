"""Flax Linen modules: they own parameters and call plain functions."""

from jaxattn.nn.stream import Edit, Stream
from jaxattn.nn.transformer import Decoder, stack_layers, unstack_layers

__all__ = ["Decoder", "Edit", "Stream", "stack_layers", "unstack_layers"]
