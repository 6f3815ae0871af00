"""What travels beside the residual stream: positions, segments, prefix, and edits."""

from __future__ import annotations

from typing import Literal

from flax import struct

from jaxattn.errors import ConfigError
from jaxattn.types import Leaf

Phase = Literal["prompt", "answer"]
TAGS = "tags"  # variables of inference: {"prompt": [B, P]}
NO_PROMPT, OTHER, USER = 0, 1, 2  # behind a row's prompt; of a prompt: template and system prompt; the user's own words


@struct.dataclass
class Stream:
    """Explicit per-token facts every layer may need; positions do not decrease inside a segment.

    `phase` says whether tokens are being read or made, which their number does not. `carry` is what a layer leaves for
    those above it. `tags` say what the tokens of a row's prompt are, by position; see `TAGS`.
    """

    positions: Leaf  # [B, T]
    segments: Leaf  # [B, T]
    prefix_len: Leaf = None  # [B] or None
    repetition: Leaf = None  # [], which repetition of the layer pattern runs, under scan_layers
    rotary: Leaf = None  # (cos, sin) [B, T, 1, R] of the positions, made once for all layers
    carry: Leaf = None  # {name: array} or None
    heads: Leaf = None  # {name: [H]}, a layer's rows of the head tables
    tags: Leaf = None  # [B, P], one of the numbers of `TAGS` for every position of a prompt
    causal: bool = struct.field(pytree_node=False, default=True)
    phase: Phase = struct.field(pytree_node=False, default="prompt")


Component = Literal["attn", "mlp", "block", "head"]


@struct.dataclass
class Edit:
    """Zero or replace one component's output at one layer.

    component: "attn" (after W_O), "mlp", "block" (the whole update of the residual stream) or "head"
      (one head's output before W_O; needs `head`).
    value: None zeroes; an array replaces: [B,T,E] for attn and mlp (their output), [B,T,E] for block (the
      residual stream after it), [B,T,V] for head.
    """

    layer: int = struct.field(pytree_node=False)
    component: Component = struct.field(pytree_node=False)
    head: int | None = struct.field(pytree_node=False, default=None)
    value: Leaf = None

    def __post_init__(self) -> None:
        if (self.component == "head") != (self.head is not None):
            raise ConfigError(f"edit of component {self.component!r} with head {self.head}: set head for 'head' only.")


def edits_of(edits: tuple[Edit, ...], layer: int, component: str) -> list[Edit]:
    """The edits that apply at one place."""
    return [e for e in edits if e.layer == layer and e.component == component]
