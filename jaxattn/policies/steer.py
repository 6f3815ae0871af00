"""Attention steering: what of the prompt is not the user's text weighs α times as much, in every row of attention.

On the Loss of Context-awareness in General Instruction Fine-tuning (arXiv 2411.02688), §4, on PASTA (2311.02262).

    a'_j ∝ α a_j  for the columns j that are steered, a'_j ∝ a_j for all others: log α added to their scores

    mode "exclude"      those of the prompt outside the user's text: template, system prompt, the start token
    mode "include"      those of the user's text
    mode "prompt"       all of the prompt

Columns behind the prompt, the answer's own, are never steered. Rows of the prompt are steered too, so that deep keys
and values change; phases="answers" leaves the prompt as it is, which is another method. α may differ by head: the head
table `steer` [L, H] takes the place of `alpha`. Which tokens are the user's comes with the prompt (`jaxattn.nn.stream`,
`Loaded.tagged_chat`).

Deviations: the user's turns are one union; the released loop scales outside each turn, so that n of them give α^n to
the template and α^(n-1) to every turn. compound=True scales by α^(l+1) in layer l from 0, as the released hook, which
adds to one mask for all layers, would. Where weights are sigmoids, log α is added to the score just the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.masks import PADDING, Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.nn.stream import NO_PROMPT, OTHER, USER
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.bias import joined

TABLE = "steer"
MODES = {"exclude": (OTHER,), "include": (USER,), "prompt": (OTHER, USER)}
PHASES = ("all", "answers")


@dataclasses.dataclass(frozen=True)
class Spec:
    """alpha: α. mode, phases, compound: see the module. first, last: of the layers it acts in; last -1 is the last."""

    alpha: float = 0.9
    mode: str = "exclude"
    phases: str = "all"
    compound: bool = False
    first: int = 0
    last: int = -1

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"steer.alpha is {self.alpha} but must be positive and finite, such as 0.9.")
        for field, known in (("mode", MODES), ("phases", PHASES)):
            if getattr(self, field) not in known:
                raise ConfigError(f"steer.{field} is {getattr(self, field)!r} but must be one of {', '.join(known)}.")
        if self.first < 0 or self.last < -1 or (self.last != -1 and self.last < self.first):
            raise ConfigError(
                f"steer.first {self.first} and last {self.last} must be layers in order, counted from 0; last=-1 is "
                "the model's last."
            )


def unfit(spec: Spec, site: Site) -> str:
    last = site.num_layers - 1
    if max(spec.first, spec.last) > last:
        return f"it has layers 0 to {last}, so first={spec.first} and last={spec.last} must be among them."
    return ""


def _log_alpha(spec: Spec, site: Site, heads: dict[str, Array]) -> Array | None:
    """log α [1 or H]; None where nothing changes."""
    table, last = heads.get(TABLE), site.num_layers - 1 if spec.last == -1 else spec.last
    if not spec.first <= site.layer <= last or (table is None and spec.alpha == 1.0):
        return None
    times = site.layer + 1 if spec.compound else 1
    return times * (jnp.full(1, math.log(spec.alpha)) if table is None else jnp.log(table))


def wrap(core: Core, here: Any, *, spec: Spec, site: Site) -> Core:
    log_alpha = _log_alpha(spec, site, here.heads)
    if log_alpha is None or (spec.phases == "answers" and here.phase != "answer"):
        return core
    if core.activation not in ("exp", "sigmoid"):
        raise ConfigError(
            f"policy steer multiplies weights through the logarithm of their scores, which {site.mechanism} does not "
            "take; use a softmax or sigmoid model."
        )
    tags = here.tags
    if tags is None:
        raise ConfigError(
            "policy steer needs to know which tokens of the prompt are the user's: use jaxattn.generate with --chat, "
            "or variables {'tags': {'prompt': ...}} (`jaxattn.text.Loaded.tagged_chat`)."
        )

    def make(attend: Callable[..., Any], some: tuple[int, ...] | None) -> Callable[..., Any]:
        own_alpha = log_alpha if some is None or len(log_alpha) == 1 else log_alpha[jnp.asarray(some)]

        def steered(
            q: Array,
            k: Array,
            v: Array,
            vis: Visibility,
            *,
            key_bias: Array | None = None,
            places: Array | None = None,
            folded: bool = False,
            **how: Any,
        ) -> tuple[Array, Array | None]:
            own_places = jnp.where(vis.k_segments != PADDING, vis.k_positions, -1)[:, None]
            at = own_places if places is None else places
            factor = jnp.tile(own_alpha, q.shape[0] // len(own_alpha))[:, None, None] if folded else own_alpha[:, None]
            own = joined(_columns(at, tags, spec.mode), factor, jnp.multiply, heads=q.shape[2])
            key_bias = own if key_bias is None else joined(key_bias, own, jnp.add, heads=q.shape[2])
            return attend(q, k, v, vis, key_bias=key_bias, places=places, folded=folded, **how)

        return steered

    return core.around(make)


def _columns(places: Int[Array, "N n S"], tags: Int[Array, "B P"], mode: str) -> Float[Array, "N n S"]:
    """1 where a key at this position is steered; rows of the batch may be repeated, as heads of it are."""
    tags = jnp.repeat(tags, len(places) // len(tags), axis=0)[:, None]
    inside = (places >= 0) & (places < tags.shape[2])
    tag = jnp.take_along_axis(tags, jnp.clip(places, 0, tags.shape[2] - 1), axis=2)
    return jnp.isin(jnp.where(inside, tag, NO_PROMPT), jnp.asarray(MODES[mode])).astype(jnp.float32)


POLICY = Policy(
    name="steer",
    title="Attention steering towards the user's text",
    arxiv="2411.02688",
    keeps="what the policy behind it keeps",
    reads="the template's weights times alpha",
    spec=Spec,
    wrap=wrap,
    windows=True,
    biased=True,
    depth=lambda spec: spec.first > 0 or spec.last != -1 or spec.compound,
    tables=(TABLE,),
    tagged=True,
    unfit=unfit,
    unlimited=lambda spec, length: dataclasses.replace(spec, alpha=1.0),
    variants=(Spec(alpha=0.3), Spec(alpha=0.2, mode="include", compound=True)),
)
