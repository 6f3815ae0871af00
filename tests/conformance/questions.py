"""What every mechanism is asked, one function a question; each fails with an AssertionError.

`test_core.py` asks them of every registered mechanism, `test_planted.py` of mechanisms with a known fault.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.masks import Visibility, self_visibility, visible
from jaxattn.mechanisms import Call, RowWeights
from tests import decoding
from tests.conformance.cases import LENGTH, SHORTER, TRACES, Case, close, normal, packed, seen, standard

DOCUMENTS = [SHORTER, 1, 63]  # laid end to end in a row of `standard`; the rest is padding
STARTS = [0, SHORTER, SHORTER + 1]


def equals_oracle(case: Case, q, k, v, vis: Visibility | None = None, *, rtol: float = 2e-5, **options) -> jax.Array:
    """The forward is the reference, and what the analysis weights say it is."""
    o = case.forward(q, k, v, vis, **options)
    _agree(o, case.rebuilt(q, k, v, vis, **options), rtol)
    return o


def _agree(o, oracle, rtol: float = 2e-5) -> None:
    reference, rebuilt, rows = oracle
    assert np.all(np.isfinite(reference))
    close(o, reference, rtol=rtol)
    if rebuilt is not None:
        close(rebuilt, o, rtol=rtol)
    assert np.all(np.isfinite(rows.scores))


class Examined(NamedTuple):
    """All of a case on one input by one program; gradients are those with respect to q, k, v and the parameters."""

    oracle: tuple[Any, Any, RowWeights]  # as of `Case.rebuilt`
    ours: Any
    theirs: Any


def examined(case: Case, q, k, v, vis) -> Examined:
    return jax.device_get(_examined(case, q, k, v, vis, case.params_for(q, k, v)))


@functools.partial(jax.jit, static_argnums=0)
def _examined(case: Case, q, k, v, vis, params) -> Examined:
    def scalar(o):
        """That weighs every output differently."""
        o = o.astype(jnp.float32)
        size = jax.lax.stop_gradient(jnp.maximum(1.0, jnp.mean(jnp.abs(o))))  # the slope of sin at 100 is chance
        return jnp.sum(jnp.sin(o / size) * normal(3, o.shape))

    def forward(q, k, v, params):
        return scalar(case.compute("forward", q, k, v, vis, params))

    def oracle(q, k, v, params):
        found = case.compute("rebuilt", q, k, v, vis, params)
        return scalar(found[0]), found

    ours = jax.grad(forward, argnums=(0, 1, 2, 3))(q, k, v, params)
    theirs, found = jax.grad(oracle, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, params)
    return Examined(found, ours, theirs)


def values_and_gradients(case: Case, q, k, v) -> None:
    """The forward is the reference, and so are its gradients; two documents and padding behind them."""
    length = q.shape[1]
    positions, segments = packed([length // 3 + 1, length // 2], length)
    vis = seen(positions[:1].repeat(len(q), 0), segments[:1].repeat(len(q), 0), batch=len(q), length=length)
    o, found = case.forward(q, k, v, vis), examined(case, q, k, v, vis)
    _agree(o, found.oracle)
    assert o.shape == (*q.shape[:3], v.shape[3])
    assert o.dtype == v.dtype
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-4), found.ours, found.theirs)


# --- who sees whom: one program, many inputs


def replaced(x: np.ndarray, where, value) -> np.ndarray:
    """A copy of x with x[where] = value."""
    x = x.copy()
    x[where] = value
    return x


def the_future_does_not_reach_the_past(case: Case) -> None:
    q, k, v = standard()
    before = case.forward(q, k, v, seen())
    at = 70
    change = lambda x: replaced(x, np.s_[:, at:], normal(9, x[:, at:].shape))
    after = case.forward(change(q), change(k), change(v), seen())
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert not np.allclose(before[:, at:], after[:, at:])


@functools.cache
def _documents(case: Case) -> list[np.ndarray]:
    """The answers to the documents of `standard`, each alone: the first without any padding, by the reference."""
    q, k, v = standard()
    out = [np.asarray(case.reference(*(x[:, :SHORTER] for x in (q, k, v))))]
    for start, n in list(zip(STARTS, DOCUMENTS, strict=True))[1:]:
        moved = [np.roll(x, -start, axis=1) for x in (q, k, v)]
        alone = case.forward(*moved, seen(*packed([n], LENGTH, batch=3)))
        out.append(np.asarray(alone)[:, :n])
    return out


def packed_documents_do_not_see_each_other(case: Case) -> None:
    q, k, v = standard()
    vis = seen(*packed(DOCUMENTS, LENGTH, batch=3))
    together = np.asarray(case.forward(q, k, v, vis))
    for start, alone in zip(STARTS, _documents(case), strict=True):
        close(together[:, start : start + alone.shape[1]], alone)
    changed = np.asarray(case.forward(*(replaced(x, np.s_[:, :SHORTER], 7.0) for x in (q, k, v)), vis))
    np.testing.assert_array_equal(together[:, SHORTER:], changed[:, SHORTER:])


def padding_changes_nothing_and_gives_zeros(case: Case) -> None:
    q, k, v = standard()
    alone, n = _documents(case)[0], DOCUMENTS[0]
    for left in (0, 9):
        wide = lambda x, left=left: np.roll(replaced(x, np.s_[:, n:], 50.0), left, axis=1)
        here = np.roll(np.arange(LENGTH) < n, left)
        positions, segments = (np.tile(x, (3, 1)) for x in (np.roll(np.arange(LENGTH), left) * here, here))
        o = np.asarray(case.forward(wide(q), wide(k), wide(v), seen(positions, segments)))
        close(o[:, left : left + n], alone)
        assert not np.any(o[:, :left])
        assert not np.any(o[:, left + n :])


def heads_and_rows_do_not_mix(case: Case) -> None:
    """A batch row knows itself alone, a query head itself and its key head alone."""
    q, k, v = standard()
    o = np.asarray(case.forward(q, k, v, seen()))
    rows = [2, 0, 1]
    close(case.forward(q[rows], k[rows], v[rows], seen()), o[rows], rtol=1e-6)
    other = lambda x, head: replaced(x, np.s_[:, :, head], normal(9, x[:, :, head].shape))
    changed = np.asarray(case.forward(q, other(k, 1), other(v, 1), seen()))  # of query heads 3, 4 and 5
    np.testing.assert_array_equal(changed[:, :, :3], o[:, :, :3])
    assert not any(np.allclose(changed[:, :, head], o[:, :, head]) for head in (3, 4, 5))
    changed = np.asarray(case.forward(other(q, 2), k, v, seen()))
    rest = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(changed[:, :, rest], o[:, :, rest])
    if "query" not in case.params_for(q, k, v):  # whose own query is learned does not read the token's
        assert not np.allclose(changed[:, :, 2], o[:, :, 2])


def calls_repeat_bitwise_and_compile_once(case: Case) -> None:
    q, k, v = standard()
    first = np.asarray(case.forward(q, k, v, seen()))
    before = TRACES[case, "forward"]
    assert (np.asarray(case.forward(q, k, v, seen())) == first).all()
    case.forward(*standard(seed=1), seen(segments=np.full((3, LENGTH), 2)))
    assert TRACES[case, "forward"] == before, "other values compile another program"


# --- analysis weights


@functools.partial(jax.jit, static_argnums=0)
def _some_rows(case: Case, q, k, v, vis: Visibility, params, start) -> RowWeights:
    q, v = case.gained(q, v, vis, params)
    part = jax.lax.dynamic_slice_in_dim(q, start, 9, axis=1)
    return case.mechanism.weights(part, k, vis.rows(start, 9), Call(case.spec, params, values=v, queries=q))


def weights_rebuild_the_forward_pass(case: Case) -> None:
    """Weights times [slots; values] is the output: packed, padded, plain; where it is not, the record says so."""
    q, k, v = standard()
    params = case.params_for(q, k, v)
    positions, segments = (np.array(x) for x in packed(DOCUMENTS, LENGTH, batch=3))
    positions[2], segments[2] = np.arange(LENGTH), 1
    vis = seen(positions, segments)
    o, oracle = case.forward(q, k, v, vis), examined(case, q, k, v, vis).oracle
    _agree(o, oracle)
    rows = oracle[2]
    real = rows.values[..., rows.slots :]
    assert real.shape == (3, 6, LENGTH, LENGTH)
    assert rows.scores.shape == rows.values.shape
    assert not np.any(np.where(np.asarray(visible(vis))[:, None], 0, real)), "weight on a token that is not seen"
    assert not np.any(rows.values[:2, :, sum(DOCUMENTS) :]), "a row of padding has weights"
    assert bool(case.mechanism.slots) >= bool(rows.slots), "say in `slots` what the constant slots are"
    some = _some_rows(case, q, k, v, vis, params, 47)
    assert some.slots == rows.slots
    close(some.values, rows.values[:, :, 47:56], rtol=1e-5)  # sums in another order, to the fifteenth power
    close(some.scores, rows.scores[:, :, 47:56], rtol=1e-5)
    if case.mechanism.shows(case.spec):
        _weights_say_what_they_show(case, q, k, v, vis, o, real)


def _weights_say_what_they_show(case: Case, q, k, v, vis: Visibility, o, real) -> None:
    """Rows that are not the whole output: the claim is needed, and weight means influence."""
    direct = np.einsum("bhts,bshv->bthv", real, np.repeat(v, 3, axis=2))
    assert not np.allclose(direct, o, atol=1e-3), "these weights do rebuild the output: drop `shows`"
    for j in (3, 25, 60):
        moved = case.forward(q, k, replaced(v, np.s_[:, j], v[:, j] + 1.0), vis)
        reached = np.any(np.asarray(moved) != np.asarray(o), axis=-1).swapaxes(1, 2)  # [B, H, T]
        assert np.all(reached | (real[..., j] == 0)), f"weight on token {j}, whose value has no influence"


# --- numbers


def fully_masked_rows_are_zero_with_finite_gradients(case: Case) -> None:
    q, k, v = standard()
    vis = seen(None, replaced(np.zeros((3, LENGTH)), np.s_[0, 5:], 1))
    (reference, _, rows), *gradients = examined(case, q, k, v, vis)
    for o, grads in zip((np.asarray(case.forward(q, k, v, vis)), reference), gradients, strict=True):
        assert not np.any(o[1])
        assert not np.any(o[0, :5])
        assert np.all(np.isfinite(o))
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
        assert not np.any(grads[0][1]), "queries that see nothing have no gradient"
    assert np.all(np.isfinite(rows.values))
    assert not np.any(rows.values[1])


def extreme_logits_stay_finite_and_equal_reference(case: Case, size: float) -> None:
    q, k, v = standard()
    q, k = np.ones_like(q), np.full_like(k, size / q.shape[3] ** 0.5)  # scores of `size`, and one of twice that
    k[:, 3] *= 2
    found = examined(case, q, k, v, seen())
    _agree(case.forward(q, k, v, seen()), found.oracle, 1e-4)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(found.ours))


def bf16_is_as_close_as_bf16_can_be(case: Case) -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in standard())
    o = case.forward(q, k, v, seen())
    assert o.dtype == jnp.bfloat16
    exact = examined(case, *(x.astype(np.float32) for x in (q, k, v)), seen()).oracle[0]
    if case.mechanism.name == "kernel_mlp":  # two more bf16 products before the scores
        close(o, exact, rtol=6e-2)
    else:
        close(o, exact, rtol=2e-2)


# --- decoding


CAPACITY = 29


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(case: Case, window: int | None, bias, state, q, k, v, positions, segments, params):
    TRACES[case, "step"] += 1
    q, v = case.gained(q, v, Visibility(positions, positions, segments, segments), params)
    return decoding.step(
        case.mechanism, case.spec, state, q, k, v, positions, segments, params=params, window=window, bias=bias
    )


def new_state(case: Case, q, k, v, capacity: int = CAPACITY):
    return decoding.init_state(case.mechanism, case.spec, q, k, v, capacity)


def decode(case: Case, q, k, v, pieces, *, window=None, positions=None, segments=None, bias=None) -> np.ndarray:
    """Outputs of `step` over consecutive pieces of the given lengths."""
    batch, length = q.shape[:2]
    state, params = new_state(case, q, k, v), case.params_for(q, k, v)
    positions = np.arange(length)[None].repeat(batch, 0) if positions is None else positions
    segments = np.ones((batch, length)) if segments is None else segments
    whole = lambda x: np.asarray(x, np.int32)
    outputs, at = [], 0
    for n in pieces:
        cut = lambda x, a=at, n=n: x[:, a : a + n]
        o, state = _step(case, window, bias, state, *map(cut, (q, k, v, whole(positions), whole(segments))), params)
        outputs.append(np.asarray(o))
        at += n
    return np.concatenate(outputs, axis=1)


def steps_equal_forward(case: Case, pieces) -> None:
    q, k, v = standard(length=SHORTER)
    close(decode(case, q, k, v, pieces), case.reference(q, k, v))


def left_padded_prompts_decode_like_unpadded_ones(case: Case) -> None:
    q, k, v = standard(length=SHORTER)
    alone, left = np.asarray(case.reference(q, k, v)), 6
    moved = [np.roll(x, left, axis=1) for x in (q, k, v)]
    here = np.arange(SHORTER) >= left
    places = {"positions": np.tile((np.arange(SHORTER) - left) * here, (3, 1)), "segments": np.tile(here, (3, 1))}
    o = decode(case, *moved, [9, 1, 9, 1], **places)
    close(o[:, left:], alone[:, : SHORTER - left])
    assert not np.any(o[:, :left])


def a_full_cache_is_poisoned_inside_jit(case: Case) -> None:
    q, k, v = (np.concatenate([x, x], axis=1) for x in standard(length=SHORTER))
    o = decode(case, q, k, v, [9, 9, 9, 9])
    assert np.all(np.isfinite(o[:, :27]))
    assert np.all(np.isnan(o[:, 27:36])), "an overflowing step must never look like an answer"


def windowed(length: int, window: int) -> Visibility:
    return self_visibility(3, length, window=window)
