"""Every mechanism: jit, vmap, no recompilation, and honest refusals."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest

import jaxattn
from jaxattn.errors import ConfigError
from jaxattn.masks import self_visibility
from jaxattn.mechanisms import Capabilities, get, names, resolve_mixer
from tests.conformance.cases import DEFAULTS, close, inputs

default = pytest.mark.parametrize("case", DEFAULTS, ids=str)


@default
def test_jit_and_vmap_change_nothing(case):
    q, k, v = inputs(40)
    plain = case.op_by_op(q, k, v)
    close(jax.jit(case.forward)(q, k, v), plain, rtol=1e-5)
    one = lambda q, k, v: case.forward(q[None], k[None], v[None])[0]
    close(jax.vmap(one)(q, k, v), plain, rtol=1e-5)


@default
def test_second_call_does_not_recompile(case):
    traces = 0

    @jax.jit
    def run(q, k, v, segments):
        nonlocal traces
        traces += 1
        return case.forward(q, k, v, self_visibility(2, 24, segment_ids=segments))

    for seed in (0, 1):
        run(*inputs(24, seed=seed), jnp.full((2, 24), seed + 1, jnp.int32))
    assert traces == 1


@default
def test_repeated_calls_are_bitwise_equal(case):
    q, k, v = inputs(140)
    run = jax.jit(case.forward)
    assert (run(q, k, v) == run(q, k, v)).all()


@default
def test_attend_is_the_mechanism(case):
    q, k, v = inputs(30)
    params = case.params(4, 2, 16, 16)
    o = jaxattn.attend(case.mechanism.name, q, k, v, params=params or None)
    close(o, case.reference(q, k, v, None, params))
    if params:
        with pytest.raises(ConfigError, match="owns parameters"):
            jaxattn.attend(case.mechanism.name, q, k, v)


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


@default
@pytest.mark.parametrize("capability", CAPABILITY_CALLS)
def test_a_capability_works_or_raises(case, capability, monkeypatch):
    """What is declared on runs; what is declared off raises, and the refusal itself works."""
    assert set(CAPABILITY_CALLS) == {f.name for f in dataclasses.fields(Capabilities)} - {"state", "depth"}
    wanted = dict(CAPABILITY_CALLS[capability])
    q, k, v = inputs(10, heads=4, kv_heads=wanted.pop("kv_heads", 4), value_dim=wanted.pop("value_dim", 16))
    ids = jnp.ones((2, 10), jnp.int32)
    positions = jnp.arange(10)[None].repeat(2, 0)
    if wanted.get("kv_positions"):
        wanted["kv_positions"] = positions
    if wanted.get("segment_ids"):
        wanted["segment_ids"] = ids
    if wanted.get("prefix_len"):
        wanted["prefix_len"] = jnp.array([3, 3])
    if wanted.get("bias"):
        wanted["bias"] = lambda a, b: jnp.zeros((1, 1, a.shape[1], b.shape[1]))
    params = case.params(4, k.shape[2], 16, v.shape[3]) or None
    call = lambda: jaxattn.attend(case.mechanism.name, q, k, v, params=params, **wanted)
    if getattr(case.mechanism.capabilities, capability):
        assert call().shape == (2, 10, 4, v.shape[3])
    else:
        with pytest.raises(NotImplementedError, match=f"{case.mechanism.name} .*{capability}"):
            call()
    off = dataclasses.replace(
        case.mechanism, capabilities=dataclasses.replace(case.mechanism.capabilities, **{capability: False})
    )
    monkeypatch.setattr("jaxattn._attend.get", lambda name: off)
    with pytest.raises(NotImplementedError, match=capability):
        call()


@default
def test_named_backends_never_fall_back(case):
    q, k, v = inputs(10)
    params = case.params(4, 2, 16, 16)
    close(case.forward(q, k, v, None, params, backend="reference"), case.forward(q, k, v, None, params))
    with pytest.raises(NotImplementedError, match=r"no 'tpu' backend|'tpu' was asked for but"):
        case.forward(q, k, v, None, params, backend="tpu")
    with pytest.raises(ConfigError, match="'fast' is not known"):
        case.forward(q, k, v, None, params, backend="fast")


def test_bad_calls_name_the_field_and_the_value():
    attend = inspect.unwrap(jaxattn.attend)  # as users call it, without the tests' shape checker
    q, k, v = inputs(10)
    with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):
        attend("sigmod", q, k, v)
    with pytest.raises(ConfigError, match="no option 'biass'"):
        attend("sigmoid", q, k, v, biass=1)
    with pytest.raises(ConfigError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        attend("softmax", q, k[:, :, :1].repeat(3, 2), v[:, :, :1].repeat(3, 2))
    with pytest.raises(ConfigError, match="key dim of q is 16 but that of k is 8"):
        attend("softmax", q, k[..., :8], v)
    with pytest.raises(ConfigError, match="window is 0"):
        attend("softmax", q, k, v, window=0)
    with pytest.raises(ConfigError, match=r"k is .* and v is"):
        attend("softmax", q, k, v[:, :5])


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
