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
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.errors import ConfigError
from jaxattn.mechanisms._protocol import Core
from jaxattn.nn.stream import NO_PROMPT, OTHER, USER
from jaxattn.policies._protocol import Policy, Site
from jaxattn.policies.parts.bias import check_factor, log_factor, scaled, unfit_layers

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
        check_factor("steer.alpha", self.alpha, self.first, self.last)
        for field, known in (("mode", MODES), ("phases", PHASES)):
            if getattr(self, field) not in known:
                raise ConfigError(f"steer.{field} is {getattr(self, field)!r} but must be one of {', '.join(known)}.")


def wrap(core: Core, here: Any, *, spec: Spec, site: Site) -> Core:
    log_alpha, tags = log_factor(spec, site, spec.alpha, here.heads.get(TABLE)), here.tags
    if log_alpha is None or (spec.phases == "answers" and here.phase != "answer"):
        return core
    if tags is None:
        raise ConfigError(
            "policy steer needs to know which tokens of the prompt are the user's: use jaxattn.generate with --chat, "
            "or variables {'tags': {'prompt': ...}} (`jaxattn.text.Loaded.tagged_chat`)."
        )
    times = site.layer + 1 if spec.compound else 1
    return scaled(core, "steer", site, times * log_alpha, lambda places: _columns(places, tags, spec.mode))


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
    unfit=unfit_layers,
    unlimited=lambda spec, length: dataclasses.replace(spec, alpha=1.0),
    variants=(Spec(alpha=0.3), Spec(alpha=0.2, mode="include", compound=True)),
)
