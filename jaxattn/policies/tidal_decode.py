"""TidalDecode: in an answer two layers look at all keys and choose, and the layers above read only what was chosen.

TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (arXiv 2410.05076).

    layer < first              dense
    layer = first or again     dense, and ρ_h = places of the `tokens` largest q_h·k for every query head
    other layers               attention over ρ of the nearest choosing layer below, normalised over it

Prompts are dense, nothing is forgotten, and ρ is new for every token of an answer. Layers count from 0: `again`=13 is
the released accuracy code's 13; its CUDA code has 12 there, and neighbours differ, so sweep it. With again=first one
layer chooses. The token at hand competes with the others, so that it may miss its own key (the accuracy code);
newest=True always lists it (the CUDA code).

Deviations: share="group" has one list for the query heads of a key head, by the largest of their scores, which reads a
key once for all of them; with "head", the paper's, a group reads up to H/K times as much. Of several tokens of an
answer at once each has its own lists. Scores are those of the mechanism's queries and keys, also where it makes other
weights of them or has a score-space method around it.

Left out: cache correction (encoding the answer anew every few thousand tokens), which the released code has not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility, visible
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies import dense
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.lists import attend_lists
from jaxattn.policies.parts.lots import lots
from jaxattn.stores import KVCache

LISTS = "tokens"  # what a choosing layer leaves for those above it: places in the cache, [B, H or K, T, m]
SHARE = ("head", "group")
BY = ("attention", "lots")


@dataclasses.dataclass(frozen=True)
class Spec:
    """first, again: the layers that choose, from 0. tokens: m of a list. share, newest: see the module docstring.

    by: "attention", or "lots" for a control that lists the first token of the text and draws the others by lot.
    """

    first: int = 2
    again: int = 13
    tokens: int = 256
    share: str = "head"
    newest: bool = False
    by: str = "attention"

    def __post_init__(self) -> None:
        if self.first < 0:
            raise ConfigError(f"tidal.first is {self.first} but must be a layer, counted from 0.")
        if self.again < self.first:
            raise ConfigError(
                f"tidal.again is {self.again} but must be a layer from tidal.first={self.first} on, which "
                "chooses alone where both are equal."
            )
        if self.tokens < 1:
            raise ConfigError(f"tidal.tokens is {self.tokens} but a list needs at least 1 token.")
        for field, known in (("share", SHARE), ("by", BY)):
            if getattr(self, field) not in known:
                raise ConfigError(f"tidal.{field} is {getattr(self, field)!r} but must be one of {', '.join(known)}.")

    def chooses(self, layer: int) -> bool:
        return layer in (self.first, self.again)

    def listed(self, layer: int) -> bool:
        """Whether a layer reads a list."""
        return layer > self.first and layer != self.again


def step(
    state: KVCache, q: Array, k: Array, v: Array, here: Any, *, spec: Spec, site: Site, core: Core
) -> tuple[Array, KVCache, Any]:
    state, (keys, values, vis) = dense.kept(state, k, v, here, site, core)
    q, answers, carry = core.queries(q), here.phase == "answer", here.carry
    if answers and spec.listed(site.layer):
        if not carry or LISTS not in carry:
            raise ConfigError(
                f"policy tidal: layer {site.layer} reads the list of layer {spec.first}, which keeps no keys to choose "
                "from; name a layer with attention over keys, such as softmax, as tidal.first."
            )
        o = attend_lists(core, q, state, carry[LISTS], vis)
    else:
        o = core.whole(q, keys, values, vis)
    if answers and spec.chooses(site.layer):
        carry = {**(carry or {}), LISTS: _chosen(q, keys, vis, spec, site)}
    return dense.poisoned(o, state), state, carry


def _chosen(q: Array, keys: Array, vis: Visibility, spec: Spec, site: Site) -> Int[Array, "B n T m"]:
    """Places of the keys with the largest scores, for every query head or every key head."""
    (batch, length, heads, dim), kv_heads = q.shape, site.kv_heads
    s: Float[Array, "B K G T S"]
    if spec.by == "lots":
        s = jnp.broadcast_to(lots(vis.k_positions, site)[:, :, None, None], (batch, kv_heads, 1, length, keys.shape[1]))
    else:
        rows = q.astype(jnp.float32).reshape(batch, length, kv_heads, -1, dim)
        s = jnp.einsum("btkgd,bskd->bkgts", rows, keys.astype(jnp.float32))
    if spec.share == "group":
        s = jnp.max(s, axis=2, keepdims=True)
    elif s.shape[2] == 1:
        s = jnp.repeat(s, heads // kv_heads, axis=2)
    s = s.reshape(batch, -1, length, keys.shape[1])
    if spec.newest:
        s = jnp.where((vis.q_positions[:, :, None] == vis.k_positions[:, None])[:, None], jnp.inf, s)
    s = jnp.where(visible(vis)[:, None], s, -jnp.inf)
    return jax.lax.top_k(s, min(spec.tokens, keys.shape[1]))[1]


def read(spec: Spec, site: Site, length: int) -> float:
    """Of a layer that reads lists at most: those of a group's heads may meet in the same keys."""
    if not spec.listed(site.layer):
        return length + 1.0
    lists = site.heads // site.kv_heads if spec.share == "head" else 1
    return float(min(length + 1, lists * spec.tokens))


def unfit(spec: Spec, site: Site) -> str:
    if spec.again >= site.num_layers:
        return (
            f"it has layers 0 to {site.num_layers - 1}, so again={spec.again} is none of them; "
            f"set again={site.num_layers // 2} or another of them."
        )
    return ""


POLICY = Policy(
    name="tidal",
    title="TidalDecode",
    arxiv="2410.05076",
    keeps="all",
    reads="all in the first layers and the two that choose, else the chosen tokens",
    spec=Spec,
    init=dense.init,
    step=step,
    depth=lambda spec: True,
    in_answers=True,
    read=read,
    unfit=unfit,
    unlimited=lambda spec, length: dataclasses.replace(spec, tokens=max(spec.tokens, length)),
    variants=(
        Spec(first=0, again=2, tokens=6),
        Spec(first=1, again=1, tokens=5, share="group", newest=True),
    ),
)
