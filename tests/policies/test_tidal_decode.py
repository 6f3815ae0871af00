"""TidalDecode against its rule in NumPy: who reads what in which layer, and what it costs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.mechanisms import get
from jaxattn.models import ModelConfig
from jaxattn.nn import layerwise
from jaxattn.nn.stream import Stream
from jaxattn.policies import cost, dense, resolve
from jaxattn.policies import tidal_decode as tidal
from tests.decoding import core_of, site_of

LAYERS, HEADS, KV_HEADS, DIM = 5, 4, 2, 8
PROMPT, ANSWER, LEFT = 13, 6, 3
SIZE = PROMPT + ANSWER


@functools.cache
def arrays() -> tuple[np.ndarray, ...]:
    """q [L,B,T,H,D], k and v [L,B,T,K,D]: layers that do not depend on each other."""
    rng = np.random.default_rng(0)
    draw = lambda heads: rng.normal(size=(LAYERS, 2, SIZE, heads, DIM)).astype(np.float32)
    return 2 * draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)


def places() -> tuple[np.ndarray, np.ndarray]:
    """The second row lies behind padding."""
    at = np.arange(SIZE) - np.array([[0], [LEFT]])
    return np.maximum(at, 0).astype(np.int32), (at >= 0).astype(np.int32)


def site(layer: int, qkv, layers: int = LAYERS):
    return dataclasses.replace(site_of(*(x[0] for x in qkv)), layer=layer, num_layers=layers)


@functools.partial(jax.jit, static_argnames=("spec", "phase", "mechanism"))
def stack(states, q, k, v, positions, segments, *, spec, phase, mechanism="softmax"):
    """All layers of T tokens: o [L,B,T,H,D], the states, and what the last layer has been left."""
    here, out, after, found = Stream(positions, segments, phase=phase), [], [], get(mechanism)
    dims = {"heads": HEADS, "kv_heads": KV_HEADS, "key_dim": DIM, "value_dim": DIM}
    params = found.init_params(jax.random.key(1), found.spec(), **dims)
    core = core_of(found, DIM, params=params)
    for layer, state in enumerate(states):
        o, state, carry = tidal.step(
            state, q[layer], k[layer], v[layer], here, spec=spec, site=site(layer, (q, k, v)), core=core
        )
        here = dataclasses.replace(here, carry=carry)
        out.append(o)
        after.append(state)
    return jnp.stack(out), after, here.carry


def run(spec, qkv=None, *, width=1, mechanism="softmax"):
    """o [L,B,T,H,D] of a prompt and an answer `width` tokens at a time, the states and the last lists."""
    qkv = arrays() if qkv is None else qkv
    states = [dense.init(dense.Spec(), site(n, qkv), batch=2, capacity=SIZE) for n in range(LAYERS)]
    out, at, carry = [], 0, None
    for phase, size in [("prompt", PROMPT)] + [("answer", width)] * (ANSWER // width):
        cut = [x[:, :, at : at + size] for x in qkv] + [x[:, at : at + size] for x in places()]
        o, states, carry = stack(states, *cut, spec=spec, phase=phase, mechanism=mechanism)
        out.append(np.asarray(o))
        at += size
    return np.concatenate(out, axis=2), states, carry


def softmax(s):
    w = np.exp(s - s.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def oracle(spec) -> np.ndarray:
    """The paper's loop over layers, for every row, token and query head on its own, in f64."""
    q, k, v = (x.astype(float) for x in arrays())
    group, out = HEADS // KV_HEADS, np.zeros((*q.shape[:4], DIM))
    for row, left in enumerate((0, LEFT)):
        for t in range(left, SIZE):
            rho = {}
            for layer in range(LAYERS):
                s = np.stack([k[layer, row, left : t + 1, h // group] @ q[layer, row, t, h] for h in range(HEADS)])
                answers = t >= PROMPT
                for h in range(HEADS):
                    ids = rho[h] if answers and spec.first < layer != spec.again else np.arange(s.shape[1])
                    w = softmax(s[h, ids] / DIM**0.5)
                    out[layer, row, t, h] = w @ v[layer, row, left + ids, h // group]
                if answers and layer in (spec.first, spec.again):
                    for h in range(HEADS):
                        mine = s[h] if spec.share == "head" else s[h // group * group :][:group].max(0)
                        mine = np.where(np.arange(len(mine)) == t - left, np.inf, mine) if spec.newest else mine
                        rho[h] = np.argsort(-mine, kind="stable")[: spec.tokens]
    return out


def own(o: np.ndarray) -> np.ndarray:
    """Without padding."""
    return np.concatenate([o[:, 0].ravel(), o[:, 1, LEFT:].ravel()])


SPECS = [
    tidal.Spec(1, 3, tokens=4),
    tidal.Spec(0, 2, tokens=4, share="group"),
    tidal.Spec(1, 1, tokens=3, newest=True),
    tidal.Spec(1, 3, tokens=99, share="group"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_papers_loop_over_layers(spec):
    np.testing.assert_allclose(own(run(spec)[0]), own(oracle(spec)), atol=2e-5)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_several_tokens_at_once_have_their_own_lists(spec):
    found, _, carry = run(spec, width=3)
    np.testing.assert_allclose(own(found), own(run(spec)[0]), atol=1e-5)
    assert carry["tokens"].shape == (2, HEADS if spec.share == "head" else KV_HEADS, 3, spec.tokens)


def test_where_every_layer_chooses_it_is_dense():
    spec = tidal.Spec(3, 4, tokens=1)
    found, whole = run(spec)[0], run(tidal.Spec(0, 4, tokens=SIZE))[0]
    np.testing.assert_allclose(own(found), own(whole), atol=1e-5)


@pytest.mark.parametrize(("layer", "reads"), [(2, False), (4, False), (1, True), (3, True)])
def test_garbage_that_is_not_listed_reaches_nobody(layer, reads):
    """Keys and values outside the lists are poisoned: layers of lists must not feel it, those that choose do."""
    spec = SPECS[0]
    _, states, _ = run(spec)
    cut = [x[:, :, -1:] for x in arrays()] + [np.full((2, 1), SIZE, np.int32), np.ones((2, 1), np.int32)]
    states = [dataclasses.replace(s, length=s.length - 1) for s in states]  # room for one more
    clean, _, _ = stack(states, *cut, spec=spec, phase="answer")
    below = spec.first if layer < spec.again else spec.again
    _, _, lists = stack(states[: below + 1], *cut, spec=spec, phase="answer")
    listed = np.zeros((2, SIZE), bool)
    for row in range(2):
        listed[row, np.unique(np.asarray(lists["tokens"])[row])] = True
    listed[:, -1] = True
    hidden = ~listed[:, None, :, None]
    assert (~listed).sum() > 2
    dirty = list(states)
    dirty[layer] = dataclasses.replace(
        states[layer],
        head_keys=jnp.where(hidden, 50.0, states[layer].head_keys),
        head_values=jnp.where(hidden, 50.0, states[layer].head_values),
    )
    found, _, _ = stack(dirty, *cut, spec=spec, phase="answer")
    assert np.array_equal(found[layer], clean[layer]) != reads


def test_one_token_of_a_prompt_is_no_answer():
    states = [dense.init(dense.Spec(), site(n, arrays()), batch=2, capacity=SIZE) for n in range(LAYERS)]
    cut = [x[:, :, :1] for x in arrays()] + [x[:, :1] for x in places()]
    assert stack(states, *cut, spec=SPECS[0], phase="prompt")[2] is None


def test_constant_slots_are_read_once_whoever_is_listed():
    """k_bias under lists that hold all is k_bias over all keys."""
    most = [run(tidal.Spec(1, 3, tokens=SIZE, share=share), mechanism="k_bias")[0] for share in ("head", "group")]
    dense_by_choice = run(tidal.Spec(4, 4, tokens=1), mechanism="k_bias")[0]
    for found in most:
        np.testing.assert_allclose(own(found), own(dense_by_choice), atol=1e-5)
    assert np.abs(own(dense_by_choice) - own(run(tidal.Spec(4, 4, tokens=1))[0])).max() > 1e-3


def test_lots_hold_the_first_token_and_ignore_scores():
    spec = tidal.Spec(1, 3, tokens=4, by="lots")
    q, k, v = arrays()
    lists = [np.asarray(run(spec, qkv)[2]["tokens"]) for qkv in ((q, k, v), (-q, k, v))]
    np.testing.assert_array_equal(*lists)
    assert (lists[0][0] == 0).any(-1).all()
    assert (lists[0][1] == LEFT).any(-1).all(), "the first token of a padded row"


def test_bytes_read_are_the_papers():
    """N = 100K, m = 4096, 32 layers of as many key heads as heads: (4 N + 28 m) / 32 N."""
    model = ModelConfig(vocab_size=9, num_layers=32, d_model=64, num_heads=4, policy="tidal(tokens=4096)")
    costs = [cost(model.keeping, model.site(n), length=99_999, capacity=10**5) for n in range(32)]
    assert abs(np.mean([c.share for c in costs]) - 0.161) < 1e-3
    grouped = dataclasses.replace(model, num_kv_heads=2)
    shares = {
        share: cost(resolve(f"tidal(tokens=4096, share='{share}')"), grouped.site(5), length=99_999, capacity=9).share
        for share in tidal.SHARE
    }
    assert shares["head"] == 2 * shares["group"] == 2 * 4096 / 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tidal(first=1, again=6)", "again=6 is none of them; set again=2"),
        ("tidal(first=3, again=2)", "again is 2"),
        ("tidal(first=-1, again=2)", "first is -1"),
        ("tidal(first=1, again=2, tokens=0)", "at least 1 token"),
        ("tidal(first=1, again=2, share='all')", "head, group"),
        ("tidal(first=1, again=2, by='luck')", "attention, lots"),
    ],
)
def test_what_cannot_be_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig(vocab_size=9, num_layers=5, d_model=16, num_heads=2, policy=text)


def test_a_layer_without_keys_that_should_choose_is_named():
    """Layer 1 has a state of its own, so layer 2 has nobody's list."""
    qkv = arrays()
    here = Stream(*(jnp.asarray(x[:, :1]) for x in places()), phase="answer")
    state = dense.init(dense.Spec(), site(2, qkv), batch=2, capacity=SIZE)
    q, k, v = (jnp.asarray(x[2, :, :1]) for x in qkv)
    core = core_of(get("softmax"), DIM)
    with pytest.raises(ConfigError, match="layer 2 reads the list of layer 1"):
        tidal.step(state, q, k, v, here, spec=tidal.Spec(1, 3), site=site(2, qkv), core=core)


def test_prompts_of_all_layers_share_a_program():
    """Layers differ in answers alone; beside a method that differs in prompts too each has its own."""
    model = ModelConfig(vocab_size=9, num_layers=5, d_model=16, num_heads=2, policy="tidal(first=1, again=3)")
    programs = lambda model: {layerwise._like(model, layer) for layer in range(5)}
    assert programs(model) == {0}
    both = dataclasses.replace(model, policy="zero_tuning(first=1, last=2), tidal(first=1, again=3)")
    assert programs(both) == set(range(5))
