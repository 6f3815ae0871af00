"""Every mechanism through `attend`, by its capabilities and its backends; and the registry."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from jaxattn.errors import ConfigError
from jaxattn.masks import Visibility, self_visibility
from jaxattn.mechanisms import Capabilities, get, names, register, resolve_mixer, unregister
from jaxattn.rope import Alibi, alibi_slopes
from tests.conformance.cases import DEFAULTS, FULL, Case, close, grouped, inputs

default = pytest.mark.parametrize("case", grouped(DEFAULTS))


@pytest.fixture
def recorded():
    """A mechanism that remembers what its forward is called with, under a name of its own."""
    calls = {}

    def forward(*args):
        *calls["args"], calls["call"] = args
        q, _, v, _, _ = args
        return jnp.zeros((*q.shape[:3], v.shape[-1]))

    def put(case: Case):
        register(dataclasses.replace(case.mechanism, name="recorded", forward=forward))
        return calls

    yield put
    unregister("recorded")


@default
def test_attend_passes_everything_on(case, recorded):
    """Its arguments are the mechanism's: positions, segments, gains, options, scale and bias."""
    calls, can = recorded(case), case.mechanism.capabilities
    q, k, v = inputs(10)
    params = case.params(4, 2, 16, 16)
    positions = jnp.arange(10)[None].repeat(2, 0) % 5
    segments = jnp.asarray([[1] * 5 + [2] * 5] * 2)
    more = {"window": 4} if can.window else {}
    more |= {"prefix_len": jnp.array([2, 0])} if can.prefix else {}
    bias = Alibi(alibi_slopes(4)) if can.position_bias else None
    call = {"positions": positions, "segment_ids": segments, "bias": bias, "scale": 0.3, "backend": "xla", **more}
    jaxattn.attend("recorded", q, k, v, params=params or None, core=True, **call)
    vis = self_visibility(2, 10, positions=positions, segment_ids=segments, **more)
    (found_q, found_k, found_v, found_vis), found = calls["args"], calls["call"]
    wanted_q, wanted_v = case.gained(q, v, vis, params)
    jax.tree.map(np.testing.assert_array_equal, (found_q, found_k, found_v), (wanted_q, k, wanted_v))
    jax.tree.map(np.testing.assert_array_equal, found_vis, vis)
    assert dataclasses.astuple(found_vis)[5:] == dataclasses.astuple(vis)[5:]
    assert (found.spec, found.scale, found.bias, found.backend) == (case.spec, 0.3, bias, "xla")
    assert found.params == {} if not params else found.params is params


def test_attend_across_two_sequences(recorded):
    """Keys with positions and segments of their own; else the queries' where there are as many."""
    calls = recorded(DEFAULTS[names().index("softmax")])
    q, k, v = inputs(6, keys=9)
    place = lambda n, by: jnp.arange(n)[None].repeat(2, 0) * by
    own = {"kv_positions": place(9, 2), "kv_segment_ids": jnp.full((2, 9), 3), "segment_ids": jnp.full((2, 6), 3)}
    jaxattn.attend("recorded", q, k, v, causal=False, positions=place(6, 5), **own)
    vis: Visibility = calls["args"][3]
    found = (vis.q_positions, vis.k_positions, vis.q_segments, vis.k_segments)
    expected = (place(6, 5), own["kv_positions"], own["segment_ids"], own["kv_segment_ids"])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not vis.causal
    q, k, v = inputs(6)
    jaxattn.attend("recorded", q, k, v, positions=place(6, 5), kv_segment_ids=jnp.ones((2, 6), jnp.int32))
    np.testing.assert_array_equal(calls["args"][3].k_positions, place(6, 5))


@pytest.mark.parametrize("case", grouped(FULL))
def test_attend_is_the_mechanism(case):
    q, k, v = inputs(30)
    params = case.params(4, 2, 16, 16)
    o = jax.jit(lambda *x: jaxattn.attend(case.mechanism.name, *x, params=params or None, core=True))(q, k, v)
    close(o, case.reference(q, k, v, None, params))


CAPABILITY_CALLS = {
    "causal_self": {},
    "noncausal_self": {"causal": False},
    "causal_cross": {"kv_positions": True},
    "noncausal_cross": {"kv_positions": True, "causal": False},
    "gqa": {"kv_heads": 2},
    "value_dim": {"value_dim": 8},
    "segments": {"segment_ids": True},
    "window": {"window": 4},
    "prefix": {"prefix_len": True},
    "position_bias": {"bias": True},
}


CALLED = ("noncausal_self", "window", "prefix", "position_bias")  # what a forward can be asked without attend


@default
def test_a_capability_works_or_raises(case):
    """What is declared is computed; what is declared off raises, in `attend` and in the mechanism itself."""
    assert set(CAPABILITY_CALLS) == {f.name for f in dataclasses.fields(Capabilities)} - {"state", "depth"}
    for capability in CAPABILITY_CALLS:
        wanted = dict(CAPABILITY_CALLS[capability])
        q, k, v = inputs(10, heads=4, kv_heads=wanted.pop("kv_heads", 4), value_dim=wanted.pop("value_dim", 16))
        arguments = {
            "kv_positions": jnp.arange(10)[None].repeat(2, 0),
            "segment_ids": jnp.ones((2, 10), jnp.int32),
            "prefix_len": jnp.array([3, 3]),
            "bias": Alibi(alibi_slopes(4)),
        }
        wanted |= {name: arguments[name] for name in wanted if name in arguments}
        params = case.params(4, k.shape[2], 16, v.shape[3]) or None
        name = case.mechanism.name
        call = lambda q, k, v, w=wanted, p=params, n=name: jaxattn.attend(n, q, k, v, params=p, core=True, **w)
        if getattr(case.mechanism.capabilities, capability):
            assert jax.eval_shape(call, q, k, v).shape == (2, 10, 4, v.shape[3]), capability
            continue
        with pytest.raises(NotImplementedError, match=f"{name} .*{capability}"):
            call(q, k, v)
        if capability in CALLED:
            bias = wanted.pop("bias", None)
            with pytest.raises(NotImplementedError, match=capability):
                case.reference(q, k, v, self_visibility(2, 10, **wanted), params, bias=bias)
            with pytest.raises(NotImplementedError, match=capability):
                case.forward(q, k, v, self_visibility(2, 10, **wanted), params, bias=bias)


@pytest.mark.parametrize("capability", CAPABILITY_CALLS)
def test_a_capability_that_is_switched_off_raises(capability):
    """The refusal itself, whose like no mechanism of today may need."""
    off = dataclasses.replace(get("softmax"), name="lame", capabilities=Capabilities(**{capability: False}))
    register(off)
    case = Case(off, off.spec())
    try:
        with pytest.raises(NotImplementedError, match=f"lame does not support {capability}"):
            _use(case, capability)
    finally:
        unregister("lame")


def _use(case, capability):
    wanted = dict(CAPABILITY_CALLS[capability])
    q, k, v = inputs(10, heads=4, kv_heads=wanted.pop("kv_heads", 4), value_dim=wanted.pop("value_dim", 16))
    if "kv_positions" in wanted:
        wanted["kv_positions"] = jnp.arange(10)[None].repeat(2, 0)
    if "segment_ids" in wanted:
        wanted["segment_ids"] = jnp.ones((2, 10), jnp.int32)
    if "prefix_len" in wanted:
        wanted["prefix_len"] = jnp.array([3, 3])
    if "bias" in wanted:
        wanted["bias"] = Alibi(alibi_slopes(4))
    return jaxattn.attend(case.mechanism.name, q, k, v, **wanted)


@default
def test_named_backends_never_fall_back(case):
    q, k, v = inputs(10)
    params = case.params(4, 2, 16, 16)
    with pytest.raises(NotImplementedError, match=r"no 'tpu' backend|'tpu' was asked for but"):
        case.forward(q, k, v, None, params, backend="tpu")
    with pytest.raises(ConfigError, match="'fast' is not known"):
        case.forward(q, k, v, None, params, backend="fast")
    if case in FULL:
        close(case.forward(q, k, v, None, params, backend="reference"), case.forward(q, k, v, None, params))


def test_registry_lists_every_mechanism_once():
    assert names() == sorted(set(names()))
    for name in names():
        mechanism = get(name)
        assert mechanism.name == name
        assert mechanism.arxiv.count(".") == 1
        assert mechanism.title
        assert mechanism.equation
        assert resolve_mixer(name).spec == mechanism.spec()


def test_mixer_texts_are_parsed_and_never_executed():
    assert resolve_mixer("none").mechanism is None
    choice = resolve_mixer("sigmoid(train_len=256, window=8)")
    assert (choice.spec.train_len, choice.window) == (256, 8)
    for bad in (
        "softmax(__import__('os'))",
        "softmax(window=print(1))",
        "soft max",
        "softmax()()",
        "softmax(2)",
    ):
        with pytest.raises(ConfigError):
            resolve_mixer(bad)
