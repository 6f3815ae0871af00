"""Which sparse pattern stands in best for each head of a model, at the cost of one of them: MInference's own search.

Algorithm 1 of MInference (arXiv 2407.02490). On one reference prompt, for every head and pattern, the largest budget is
found that reads at most the tiles (pairs of a block of queries and one of keys) that an A-shape reads, and the pattern
is taken whose output is closest to dense attention's. Tiles are counted as they are read, so that costs match whatever
a head looks at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxattn.analysis.capture import look
from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility, self_visibility
from jaxattn.mechanisms import Mechanism
from jaxattn.mechanisms._protocol import Call, Core
from jaxattn.models import ModelConfig
from jaxattn.policies import Site, get, text_of
from jaxattn.policies.minference import PATTERNS, TABLES, Spec, chosen
from pallas_kernels.block_sparse import block_lists

SHARES = (0.0, 0.1, 0.3, 0.6)  # of the target's keys that a candidate spends on columns


class Found(NamedTuple):
    """tables: [L, H] by the names that the policy reads. errors: [L, H, candidates], |o - dense|² / |dense|²; inf where
    a candidate has no budget so small. tiles: [L, H], of the winners. target: tiles that none exceeds. dense: tiles of
    dense attention. candidates: (pattern, columns in tokens)."""

    tables: dict[str, np.ndarray]
    errors: np.ndarray
    tiles: np.ndarray
    target: int
    dense: int
    candidates: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What is static of a layer, the same for all that share a program."""

    mechanism: Mechanism
    options: Any
    site: Site
    spec: Spec
    backend: str


def candidates(spec: Spec) -> tuple[tuple[str, int], ...]:
    """The A-shape of these options, vertical-slash with several shares of columns, and block."""
    whole = spec.init + spec.local
    columns = dict.fromkeys(max(spec.sinks, -(-int(share * whole) // spec.block) * spec.block) for share in SHARES)
    return (("a_shape", spec.init), *(("vertical_slash", n) for n in columns), ("block", 0))


def search(
    model: ModelConfig,
    params: Any,
    tokens: Int[np.ndarray, "T"],
    spec: Spec,
    *,
    show: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Found:
    """Head tables for `minference`. Layers without keys to choose from have zeros.

    Args:
      tokens: the reference prompt.
      spec: its `init` and `local` are the target, the rest is as the policy will be used.
      show: what the loop's layer numbers pass through, such as a progress bar.

    Raises:
      ConfigError: a layer that the policy cannot serve, or a prompt that the target reads whole.
    """
    dataclasses.replace(model, policy=text_of(get("minference"), spec))  # refuses what the policy cannot serve
    model = dataclasses.replace(model, policy="")
    count, heads, own = -(-len(tokens) // spec.block), model.num_heads, candidates(spec)
    whole, target = count * (count + 1) // 2, _target(spec, count)
    if target >= whole:
        raise ConfigError(
            f"init {spec.init} and local {spec.local} read all of the {len(tokens)} tokens: give a longer prompt, or a "
            "smaller target."
        )
    inputs = jax.jit(functools.partial(_inputs, model))(params, jnp.asarray(tokens)[None])
    tables = {name: np.zeros((model.num_layers, heads), np.int32) for name in TABLES}
    errors, tiles = np.full((model.num_layers, heads, len(own)), np.inf), np.zeros((model.num_layers, heads), np.int32)
    for layer in show(sorted(inputs)):
        choice, read = model.mixer(layer), inputs.pop(layer)
        assert choice.mechanism is not None
        site = dataclasses.replace(model.site(layer), layer=0)  # layers share programs
        kind = _Kind(choice.mechanism, choice.spec, site, spec, model.backend)
        dense, tried = _output(kind, read), []
        for n, (pattern, columns) in enumerate(own):
            table = _budget(kind, read, PATTERNS.index(pattern), columns, target)
            fits = np.asarray(_tiles(kind, read, table)) <= target
            errors[layer, :, n] = np.where(fits, np.asarray(_error(kind, read, table, dense)), np.inf)
            tried.append(table)
        best = np.argmin(errors[layer], axis=1)
        for name in TABLES:
            tables[name][layer] = np.stack([table[name] for table in tried])[best, np.arange(heads)]
        tiles[layer] = np.asarray(_tiles(kind, read, {name: tables[name][layer] for name in TABLES}))
    return Found(tables, errors, tiles, target, whole, own)


def _inputs(model: ModelConfig, params: Any, tokens: Array) -> dict[int, Any]:
    """(q, k, v, the mechanism's parameters) of every layer that has keys."""
    views = [view for view in look(model, params, tokens).attention if view.mechanism.core is not None]
    return {view.layer: (view.queries, view.keys, view.values, view.call.params) for view in views}


def _target(spec: Spec, count: int) -> int:
    """Tiles that the A-shape reads of a prompt of `count` blocks."""
    first, near = -(-spec.init // spec.block), -(-spec.local // spec.block) + 1
    return sum(min(row + 1, near + min(first, max(0, row + 1 - near))) for row in range(count))


def _budget(kind: _Kind, read: Any, number: int, columns: int, target: int) -> dict[str, np.ndarray]:
    """Tables [H] of a pattern with its largest budgets within the target."""
    size, heads = kind.spec.block, kind.site.heads
    full = lambda n: np.full(heads, n, np.int32)
    make = {
        0: lambda n: (full(kind.spec.init), full(kind.spec.local)),
        1: lambda n: (full(columns), n * size),
        2: lambda n: (n, full(0)),
    }[number]
    table = lambda n: dict(zip(TABLES, (full(number), *make(n)), strict=True))
    low, high = full(1), full(-(-read[0].shape[1] // size))
    while number and np.any(low < high):  # the last that fits is from low to high
        middle = (low + high + 1) // 2
        fits = np.asarray(_tiles(kind, read, table(middle))) <= target
        low, high = np.where(fits, middle, low), np.where(fits, high, np.maximum(low, middle - 1))
    return table(low)


def _rules(kind: _Kind, read: Any) -> Visibility:
    return self_visibility(1, read[0].shape[1], window=kind.site.window)


def _core(kind: _Kind, params: Any) -> Core:
    make: Any = kind.mechanism.core
    return make(Call(kind.options, params, backend=kind.backend), kind.site.key_dim)


def _mask(kind: _Kind, read: Any, table: Any) -> Array:
    q, k, _, params = read
    core = _core(kind, params)
    rules = _rules(kind, read)
    table = {name: jnp.asarray(x) for name, x in table.items()}
    q, k = core.queries(q), core.keys(k)
    return chosen(q, k, rules, table, spec=kind.spec, site=kind.site, scale=core.scale)[0]


@functools.partial(jax.jit, static_argnums=0)
def _tiles(kind: _Kind, read: Any, table: Any) -> Int[Array, "H"]:
    return jnp.sum(_mask(kind, read, table), axis=(0, 2, 3), dtype=jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _output(kind: _Kind, read: Any, table: Any = None) -> Float[Array, "1 T H V"]:
    """The heads' output over the blocks of the tables, or over all."""
    q, k, v, params = read
    core, how = _core(kind, params), {}
    rules = _rules(kind, read)
    if table is not None:
        mask, size = _mask(kind, read, table), kind.spec.block
        how["blocks"] = {"blocks": block_lists(mask, mask.shape[-1]), "block_q": size, "block_k": size}
    return core.whole(core.queries(q), core.keys(k), v, rules, **how)


@functools.partial(jax.jit, static_argnums=0)
def _error(kind: _Kind, read: Any, table: Any, dense: Array) -> Float[Array, "H"]:
    """|o - dense|² / |dense|² of each head."""
    squares = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(0, 1, 3))
    o = _output(kind, read, table)
    return squares(o.astype(jnp.float32) - dense.astype(jnp.float32)) / jnp.maximum(squares(dense), 1e-30)
