"""What an inference policy offers: how a trained model's keys and values are kept, and which of them a query reads.

    init(spec, site, *, batch, capacity)                  -> state     every leaf has the batch in front
    step(state, q, k, v, here, *, spec, site, core)       -> (o, state, carry)
    wrap(core, here, *, spec, site)                       -> core      of scores and heads, goes with any policy

`step` appends T new tokens, chooses, and attends, for prompts and answers alike; `here` is the stream of these tokens
(`jaxattn.nn.stream`): positions, segments, `phase` ("prompt" or "answer"), `carry` (what layers below left) and `heads`
(this layer's rows of the head tables). q [B,T,H,D], k [B,T,K,D], v [B,T,K,V], o [B,T,H,V]; `core` attends
(`jaxattn.mechanisms._protocol.Core`). A policy without `step` only wraps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxattn.rope import Rope


@dataclasses.dataclass(frozen=True)
class Site:
    """The layer a policy works in; all of it static.

    window: of the layer's attention, in positions. rope: rotary encoding. bias: whether scores have a position bias.
    inseparable: why the mechanism's keys cannot be hidden or attended in parts; "" where they can.
    front: learned tokens in front of the stream. inserts: whether the model inserts tokens of its own.
    scanned: whether one program serves all layers, which then do not know their number.
    position: the model's position encoding. trained: positions the model knows, 0 where nobody says.
    maps: whether queries and keys pass a feature map behind their rotation, so that kept keys cannot be turned.
    """

    mechanism: str
    layer: int
    num_layers: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    window: int | None = None
    rope: Rope | None = None
    bias: bool = False
    inseparable: str = ""
    front: int = 0
    inserts: bool = False
    scanned: bool = False
    position: str = "nope"
    trained: int = 0
    maps: bool = False


@dataclasses.dataclass(frozen=True)
class Policy:
    """One paper's way to keep and read keys. `variants`: settings for tests, the first with a budget of few tokens.

    keeps, reads: in words, for tables.
    rotates: q and k come as projected, and the policy turns them by `site.rope`; else they come rotated.
    separates: it hides keys or attends to them in parts.
    windows, biased, front: it works in layers with a sliding window, with a position bias, behind learned tokens.
    depth(spec): layers differ, or tell each other something (`carry`); in_answers: they do when answering alone.
    one_piece(spec): a prompt has to be read in one call.
    reach(spec, trained): most positions of a text for a model that knows `trained` of them (0: unlimited, in both).
    read(spec, site, length): keys that a key head reads for a new token behind `length` others, on average.
    score_bias(spec, site, heads): what `wrap` adds to scores, as a `jaxattn.rope.PositionBias`, for attention maps.
    tables: names of the head tables it reads from `here.heads`.
    tagged: it reads what the tokens of a prompt are (`Stream.tags`).
    settle(spec, tables, kv_heads) -> spec: its options with what head tables say about sizes, which a program has to
      know; tables: all of a file, [L, H] by name. None: it has no such options.
    unfit(spec, site): why it cannot work there, one sentence; "" where it can.
    unlimited(spec, length): its options with a budget that holds `length` tokens: then it is dense attention.
    bounded: its state has one size, whatever the text and the room for it.
    measured(state): numbers that it counted itself, by name, for the report.
    """

    name: str
    title: str
    arxiv: str
    keeps: str
    reads: str
    spec: type
    init: Callable[..., Any] | None = None
    step: Callable[..., tuple[Any, Any, Any]] | None = None
    wrap: Callable[..., Any] | None = None
    score_bias: Callable[..., Any] | None = None
    rotates: bool = False
    separates: bool = True
    windows: bool = False
    biased: bool = False
    front: bool = False
    depth: Callable[[Any], bool] = lambda spec: False
    in_answers: bool = False
    bounded: bool = False
    one_piece: Callable[[Any], bool] = lambda spec: False
    reach: Callable[[Any, int], int] = lambda spec, trained: trained
    read: Callable[[Any, Site, int], float] = lambda spec, site, length: float(length)
    tables: tuple[str, ...] = ()
    tagged: bool = False
    settle: Callable[[Any, dict[str, Any], int], Any] | None = None
    unfit: Callable[[Any, Site], str] = lambda spec, site: ""
    unlimited: Callable[[Any, int], Any] = lambda spec, length: spec
    measured: Callable[[Any], dict[str, Any]] = lambda state: {}
    variants: tuple[Any, ...] = ()
