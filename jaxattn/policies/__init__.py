"""Inference policies: how a trained model's keys and values are kept and read. One paper, one file; see `_protocol`.

names()            every registered name
get(name)          the `Policy`
register(policy)   one of your own, kept outside the library
resolve(text)      "zero_tuning(gamma=2), streaming(sinks=4)" -> its `Plan`
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.errors import ConfigError, shown
from jaxattn.mechanisms._protocol import Core
from jaxattn.policies._protocol import Policy, Site
from jaxattn.registry import Registry, parse_list

__all__ = [
    "Cost",
    "Plan",
    "Policy",
    "Site",
    "cost",
    "get",
    "names",
    "refuse",
    "register",
    "resolve",
    "text_of",
    "unregister",
]

POLICIES: Registry[Policy] = Registry(
    kind="policy",
    package="jaxattn.policies",
    record=Policy,
    attribute="POLICY",
    places={
        "dense": "dense",
        "duo": "duo",
        "h2o": "h2o",
        "mask_heads": "mask_heads",
        "minference": "minference",
        "razor": "razor",
        "steer": "steer",
        "streaming": "streaming_llm",
        "tidal": "tidal_decode",
        "watch": "watch",
        "zero_tuning": "zero_tuning",
    },
)
names, get = POLICIES.names, POLICIES.get


def register(policy: Policy, *, replace: bool = False) -> Policy:
    """Make a policy of your own known by its name, to `get`, `--policy` and the tests; see `Registry.register`."""
    resolve.cache_clear()
    return POLICIES.register(policy, replace=replace)


def unregister(name: str) -> None:
    """Forget what `register` added under this name."""
    resolve.cache_clear()
    POLICIES.unregister(name)


class Plan(NamedTuple):
    """What a model does at inference: one policy that keeps and reads, and the score-space methods around it."""

    policy: Policy
    spec: Any
    wraps: tuple[tuple[Policy, Any], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether this is nothing but dense attention."""
        return self.policy.name == "dense" and not self.wraps

    @property
    def parts(self) -> tuple[tuple[Policy, Any], ...]:
        """All of its policies with their options."""
        return (*self.wraps, (self.policy, self.spec))

    @property
    def prompt_depth(self) -> bool:
        """Whether layers differ in what they do with a prompt, so that each has a program of its own."""
        return any(policy.depth(spec) and not policy.in_answers for policy, spec in self.parts)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the head tables that are read."""
        return tuple(name for policy, _ in self.parts for name in policy.tables)

    @property
    def tagged(self) -> bool:
        """Whether some policy reads what the tokens of a prompt are."""
        return any(policy.tagged for policy, _ in self.parts)

    def wrapped(self, core: Core, here: Any, site: Site) -> Core:
        """The core with every method on scores and heads around it; `here` is the stream of the new tokens."""
        for policy, spec in reversed(self.wraps):
            assert policy.wrap is not None
            core = policy.wrap(core, here, spec=spec, site=site)
        return core


@functools.cache
def resolve(text: str) -> Plan:
    """``"zero_tuning(gamma=2), streaming(sinks=4)"``: the last name keeps and reads, those before it wrap.

    Raises:
      ConfigError: an unknown name or option, an impossible value, or more than one policy that keeps.
    """
    parts = [POLICIES.resolve(entry) for entry in parse_list("policy", text)] if text.strip() else []
    keeping = [part for part in parts if part[0].step is not None]
    if len(keeping) > 1 or (keeping and parts[-1] != keeping[0]):
        raise ConfigError(
            f"policy {shown(text)} must name one policy that keeps and reads keys, as its last: "
            f"{' and '.join(policy.name for policy, _ in keeping)} do."
        )
    last = keeping[0] if keeping else (get("dense"), get("dense").spec())
    return Plan(*last, tuple(part for part in parts if part[0].step is None))


def text_of(policy: Policy, spec: Any) -> str:
    """The text that `resolve` makes into this policy with these options."""
    options = ", ".join(f"{f.name}={getattr(spec, f.name)!r}" for f in dataclasses.fields(spec))
    return f"{policy.name}({options})" if options else policy.name


def refuse(plan: Plan, site: Site) -> None:
    """Refuse a layer in which a policy cannot work.

    Raises:
      ConfigError: naming the policy, the layer and the reason.
    """
    for policy, spec in plan.parts:
        if reason := _unfit(policy, spec, site):
            raise ConfigError(f"policy {policy.name} cannot serve layer {site.layer} ({site.mechanism}): {reason}")


def _unfit(policy: Policy, spec: Any, site: Site) -> str:
    if policy.separates and site.inseparable:
        return f"{site.inseparable}, so keys cannot be left out; use policy dense."
    if not policy.windows and site.window is not None:
        return f"it has a window of {site.window} positions already; use a model without, or policy dense."
    if not policy.biased and site.bias:
        return "its scores have a position bias; use a model with rope or nope, or policy dense."
    if not policy.front and site.front:
        return "the model puts learned tokens in front of the stream; use policy dense."
    if site.inserts and policy.name != "dense":
        return "the model inserts landmark tokens; use policy dense."
    if site.scanned and (policy.depth(spec) or policy.tables):
        return "its layers differ, which model.scan_layers=True does not allow; set it False (`unstack_layers`)."
    return policy.unfit(spec, site)


class Cost(NamedTuple):
    """held: bytes of the state; read: bytes of keys and values for a new token; share: of the keys dense would read."""

    held: int
    read: float
    share: float


def cost(plan: Plan, site: Site, *, length: int, capacity: int) -> Cost:
    """What a row of a layer costs behind `length` tokens, with room for `capacity`."""
    policy, spec = plan.policy, plan.spec
    assert policy.init is not None
    state = jax.eval_shape(lambda: policy.init(spec, site, batch=1, capacity=capacity))
    held = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    token = site.kv_heads * (site.key_dim + site.value_dim) * jnp.dtype(site.dtype).itemsize
    keys = policy.read(spec, site, length)
    return Cost(held, keys * token, keys / (length + 1))
