"""Masked heads: chosen query heads attend uniformly, or give nothing, to see what hangs on them.

Retrieval Head Mechanistically Explains Long-Context Factuality (arXiv 2404.15574), whose code masks a head by setting
its query to 0, which is no ablation of it:

    uniform     q = 0: every visible key has the same weight, so the output is the mean of the visible values
    zero        output 0, in front of W_O

`heads` names them as "layer-head", both from 0. Without it they come from the head table `mask_heads` [L, H], which
numbers heads from 1 on in the order in which they are to be masked: the first `top` are. `evals.heads` writes it, the
heads with the largest scores first. phases="answers" reads prompts with all heads, as the paper does.

Deviations: sigmoid weights of score 0 do not sum to one. Constant slots are keys like others. With a score-space method
around it, what that adds to scores stays. A policy that chooses keys by attention chooses by what is left of it.

Left out: mean ablation, for which head tables would have to hold a vector a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxattn.errors import ConfigError, shown
from jaxattn.masks import Visibility
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Policy, Site

TABLE = "mask_heads"
BY = ("uniform", "zero")
PHASES = ("all", "answers")


@dataclasses.dataclass(frozen=True)
class Spec:
    """heads: such as "16-19 11-15". top: of the head table, where `heads` names none. by, phases: see the module."""

    heads: str = ""
    top: int = 10
    by: str = "uniform"
    phases: str = "all"

    def __post_init__(self) -> None:
        for field, known in (("by", BY), ("phases", PHASES)):
            if getattr(self, field) not in known:
                raise ConfigError(
                    f"mask_heads.{field} is {getattr(self, field)!r} but must be one of {', '.join(known)}."
                )
        if self.top < 0:
            raise ConfigError(f"mask_heads.top is {self.top} but must be 0 heads or more.")
        _ = self.named

    @property
    def named(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of `heads`."""
        words = self.heads.replace(",", " ").split()
        pairs = [word.split("-") for word in words]
        for word, pair in zip(words, pairs, strict=True):
            if len(pair) != 2 or not all(x.isascii() and x.isdigit() and len(x) < 7 for x in pair):
                raise ConfigError(
                    f"mask_heads.heads has {shown(word)} but names heads as layer-head, both counted from 0, such as "
                    "'16-19 11-15'."
                )
        return tuple((int(layer), int(head)) for layer, head in pairs)


def unfit(spec: Spec, site: Site) -> str:
    for layer, head in spec.named:
        if layer >= site.num_layers or head >= site.heads:
            return (
                f"it has no head {layer}-{head}: layers are 0 to {site.num_layers - 1} and heads 0 to {site.heads - 1}."
            )
    if spec.by == "uniform" and site.bias:
        return "its scores have a position bias, which queries of 0 leave, so no head is uniform; use by='zero'."
    return ""


def _masked(spec: Spec, site: Site, heads: dict[str, Array]) -> Array | np.ndarray | None:
    """Which heads [H] of the layer; None where there is none."""
    if spec.heads:
        own = np.isin(np.arange(site.heads), [head for layer, head in spec.named if layer == site.layer])
        return own if own.any() else None
    if not spec.top:
        return None
    if TABLE not in heads:
        raise ConfigError(
            f"policy mask_heads masks the first {spec.top} heads of the head table {TABLE!r}, which is not there: give "
            "the file of evals.heads as --heads, or name heads in its option heads."
        )
    order = heads[TABLE]
    return (order > 0) & (order <= spec.top)


def wrap(core: Core, here: Any, *, spec: Spec, site: Site) -> Core:
    if spec.phases == "answers" and here.phase != "answer":
        return core
    masked = _masked(spec, site, here.heads)
    if masked is None:
        return core
    if spec.by == "zero":

        def join(parts: Any, q: Array, vis: Visibility) -> Array:
            return _silent(core.join(parts, q, vis), jnp.asarray(masked))

        return dataclasses.replace(core, join=join)
    if core.activation not in ("exp", "sigmoid"):
        raise ConfigError(
            f"policy mask_heads makes heads uniform through scores of 0, which are no weights in {site.mechanism}; use "
            "by='zero'."
        )
    return dataclasses.replace(core, queries=lambda q: _silent(core.queries(q), jnp.asarray(masked)))


def _silent(x: Array, masked: Bool[Array, "H"]) -> Array:
    """x [B, T, H, D] with zeros in masked heads."""
    return jnp.where(masked[:, None], jnp.zeros((), x.dtype), x)


POLICY = Policy(
    name="mask_heads",
    title="Masked heads",
    arxiv="2404.15574",
    keeps="what the policy behind it keeps",
    reads="what that policy reads, but for the masked heads",
    spec=Spec,
    wrap=wrap,
    separates=False,
    windows=True,
    biased=True,
    front=True,
    depth=lambda spec: bool(spec.heads),
    tables=(TABLE,),
    unfit=unfit,
    unlimited=lambda spec, length: dataclasses.replace(spec, heads="", top=0),
    variants=(Spec(heads="0-1 1-2"), Spec(heads="0-0 1-3", by="zero", phases="answers")),
)
