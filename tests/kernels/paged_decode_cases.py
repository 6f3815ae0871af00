"""What the tests of paged decoding share: caches with lists of pages, and the answer by NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.rope import Rope, RopeScaling
from pallas_kernels import interpreted
from pallas_kernels.paged_decode import paged_decode
from tests.conformance.cases import close
from tests.conformance.cases import normal as numbers

normal = lambda seed, shape: jnp.asarray(numbers(seed, shape))


def typed(x: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; the four axes k of the op are 1 or `kv_heads`, 0 = not given."""

    batch: int = 2
    queries: int = 1
    heads: int = 6
    kv_heads: int = 3
    dim: int = 24
    value_dim: int = 40
    pools: int = 1
    pages: int = 12
    page: int = 16
    listed: int = 7
    tables: int = 1
    lengths: tuple[int, ...] = ()
    key_bias: int = 0
    positions: int = 0
    rope: Rope | None = None
    splits: int | None = None
    dtype: str = "float32"
    value_dtype: str = ""

    def arguments(self):
        """Arrays, and settings with more arrays."""
        draw, slots = np.random.default_rng(1), self.listed * self.page
        shape = (self.pools, self.kv_heads, self.pages, self.page)
        q = typed(numbers(0, (self.batch, self.queries, self.heads, self.dim)), self.dtype)
        k = typed(numbers(1, (*shape, self.dim)), self.dtype)
        v = typed(numbers(2, (*shape, self.value_dim)), self.value_dtype or self.dtype)
        tables = jnp.asarray(draw.integers(-1, self.pages, (self.batch, self.tables, self.listed)), jnp.int32)
        lengths = jnp.asarray(draw.integers(0, slots + 2, self.lengths), jnp.int32) if self.lengths else None
        more = {"scale": 0.3, "splits": self.splits}
        if self.key_bias:
            bias = numbers(3, (self.batch, self.key_bias, slots))
            more["key_bias"] = jnp.asarray(np.where(bias > 1, np.float32(-1e30), bias))
        if self.rope is not None:
            places = draw.integers(0, 500, (self.batch, self.positions, slots))
            more |= {"rope": self.rope, "key_positions": jnp.asarray(places, jnp.int32)}
        return (q, k, v, tables, lengths), more


def check(arrays, more, backend, rtol=2e-5, mode="plain"):
    """o and L equal the reference's; returns them."""
    run = lambda backend: jax.jit(lambda *x: paged_decode(*x, **more, backend=backend))
    with interpreted(mode):
        o, lse = run(backend)(*arrays)
    expected, expected_lse = run("reference")(*arrays)
    assert (o.dtype, lse.dtype) == (expected.dtype, jnp.float32)
    close(o, expected, rtol=rtol)
    close(lse, expected_lse, rtol=1e-6 if rtol < 1e-3 else 1e-3)
    return np.asarray(o, np.float32), np.asarray(lse)


TURNED = Rope(1e4, fraction=0.5)


CASES = {
    "holes in the list": Case(),
    "a pool per sequence": Case(pools=2, tables=3),
    "several queries": Case(queries=3, lengths=(2, 1, 1), tables=3),
    "lengths per head and query": Case(queries=2, lengths=(2, 3, 2), tables=3, key_bias=1, splits=2),
    "bias that hides": Case(key_bias=3),
    "tokens": Case(page=1, pages=64, listed=70, lengths=(2,)),
    "tokens per head, turned": Case(page=1, pages=64, listed=40, tables=3, positions=3, rope=Rope(1e4)),
    "tokens in 16-bit tiles": Case(page=1, pages=64, listed=33, dtype="bfloat16", key_bias=1),
    "tokens of a sequence's own": Case(page=1, pages=32, listed=300, pools=2, positions=1, rope=TURNED, splits=2),
    "pages below a tile": Case(page=4, pages=16, listed=21, lengths=(2, 3), key_bias=3, positions=1, rope=TURNED),
    "pages of one tile and a half": Case(page=24, pages=5, listed=9),
    "pages read in parts": Case(page=272, pages=3, listed=2, lengths=(2,)),
    "long pages": Case(batch=1, page=768, pages=2, listed=2, positions=1, rope=Rope(1e4), kv_heads=1, heads=2),
    "splits": Case(listed=70, splits=3, lengths=(2, 3), tables=3),
    "more splits than entries": Case(listed=2, splits=5, lengths=(2,)),
    "turned keys, 16 bit": Case(positions=1, rope=Rope(1e4), dtype="bfloat16"),
    "angles that know the length": Case(positions=3, rope=Rope(1e4, scaling=RopeScaling("dynamic", 4.0, 128))),
    "nothing to turn": Case(positions=1, rope=Rope(1e4, fraction=0.0)),
    "values narrower than keys": Case(value_dtype="bfloat16"),
}
