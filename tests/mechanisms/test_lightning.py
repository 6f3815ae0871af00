"""Linear and lightning attention: the papers' numbers by hand, three slope conventions, MiniMax parity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.masks import GLOBAL, default_positions, self_visibility
from jaxattn.mechanisms import Call
from jaxattn.mechanisms.lightning import MECHANISM as LIGHTNING
from jaxattn.mechanisms.lightning import Spec, head_slopes
from jaxattn.mechanisms.linear import MECHANISM as LINEAR
from tests.conformance.cases import arrays, close, inputs, seen
from tests.mechanisms.programs import run

BOTH = pytest.mark.parametrize("mechanism", [LINEAR, LIGHTNING], ids=lambda m: m.name)

# λ of layer 0 at 8 heads as the card prints them, and single values worked by hand.
OFFICIAL_8 = [0.607, 0.779, 0.883, 0.939, 0.969, 0.984, 0.992, 0.996]
PAPER_8 = [1, 0.368, 0.135, 0.050, 0.018, 0.0067, 0.0025, 0.0009]


@pytest.mark.parametrize(
    ("slopes", "expected"), [("official", OFFICIAL_8), ("minimax", OFFICIAL_8), ("paper", PAPER_8)]
)
def test_decays_of_the_first_layer(slopes, expected):
    decays = np.exp(-head_slopes(Spec(slopes=slopes), 8, (0, 24)))
    np.testing.assert_allclose(decays, expected, atol=6e-4)


def test_conventions_part_where_heads_are_no_power_of_two():
    official = head_slopes(Spec(), 12, (0, 1))
    first = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    np.testing.assert_allclose(official, [*first, 0.70711, 0.35355, 0.17678, 0.08839], rtol=2e-5)
    minimax = head_slopes(Spec(slopes="minimax"), 12, (0, 1))
    np.testing.assert_allclose(minimax[:3], [0.62996, 0.39685, 0.25], rtol=2e-5)  # 2^(-2/3), 2^(-4/3), 2^-2


def test_layer_factors():
    """Layer 3 of 4 heads: slopes 1/4, 1/16, ... officially; 0, 2, 4, 6 in the paper."""
    at = lambda slopes, layer, count: np.asarray(head_slopes(Spec(slopes=slopes), 4, (layer, count)))
    np.testing.assert_allclose(at("official", 3, 7)[0], 0.25 * (0.5 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(at("official", 6, 7)[0], 0.25 * 1e-5, rtol=1e-2)  # the last layer hardly forgets
    np.testing.assert_allclose(at("paper", 3, 6), [0, 1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(at("minimax", 3, 7)[0], 0.25 * (1 - 3 / 6.00001 + 1e-5), rtol=1e-6)
    traced = jax.jit(lambda layer: head_slopes(Spec(), 4, (layer, 7)))(jnp.int32(3))
    np.testing.assert_allclose(traced, at("official", 3, 7), rtol=1e-6)


def test_a_row_by_hand():
    """One head of the paper's two at layer 1 of 2: s_1 = 8/2 · 1/2 = 2; identity features."""
    spec = Spec(slopes="paper", feature="identity")
    q = np.full((1, 3, 2, 1), 2, np.float32)
    k = np.float32([1, -1, 3])[None, :, None, None].repeat(2, axis=2)
    a = run(LIGHTNING, "weights", spec, q, k, self_visibility(1, 3), depth=(1, 2))
    a = jax.tree.map(np.asarray, a)
    np.testing.assert_allclose(a.values[0, 0, 2], [2, -2, 6], rtol=1e-6)  # head 0 never forgets
    np.testing.assert_allclose(a.values[0, 1, 2], [2 * np.exp(-4), -2 * np.exp(-2), 6], rtol=1e-6)
    np.testing.assert_allclose(a.scores[0, 1, 2], [2, -2, 6], rtol=1e-6)


def test_linear_is_the_paper_s_quotient():
    q, k, v = inputs(40, heads=2, kv_heads=2)
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    fq, fk, v64 = phi(np.asarray(q, np.float64)), phi(np.asarray(k, np.float64)), np.asarray(v, np.float64)
    top = np.einsum("bthd,bthdv->bthv", fq, np.cumsum(fk[..., :, None] * v64[..., None, :], axis=1))
    bottom = np.einsum("bthd,bthd->bth", fq, np.cumsum(fk, axis=1))
    close(run(LINEAR, "forward", LINEAR.spec(), q, k, v, self_visibility(2, 40)), top / (bottom[..., None] + 1e-6))


def test_scale_defaults_to_one_and_multiplies():
    call = Spec(), *inputs(20), self_visibility(2, 20)
    o = np.asarray(run(LIGHTNING, "forward", *call))
    close(run(LIGHTNING, "forward", *call, scale=0.25), 0.25 * o)
    close(run(LIGHTNING, "reference", *call, scale=0.25), 0.25 * o)


@pytest.mark.parametrize("spec", [Spec(), *LIGHTNING.variants], ids=str)
def test_depth_reaches_forward_reference_and_step(spec):
    q, k, v = inputs(70)
    vis, ones = self_visibility(2, 70), jnp.ones((2, 70), jnp.int32)
    outputs = []
    for depth in ((0, 4), (3, 4)):
        o = run(LIGHTNING, "forward", spec, q, k, v, vis, depth=depth)
        close(run(LIGHTNING, "reference", spec, q, k, v, vis, depth=depth), o, rtol=1e-5)
        dims = dict(batch=2, capacity=70, heads=4, kv_heads=2, key_dim=16, value_dim=16, dtype=q.dtype)
        state = LIGHTNING.init_state(spec, **dims)
        step = run(LIGHTNING, "step", spec, state, q, k, v, default_positions(2, 70), ones, depth=depth)
        close(step[0], o)
        outputs.append(o)
    assert not np.allclose(*outputs, rtol=1e-2), "layers forget at different rates"


@BOTH
def test_rows_of_the_weights_may_be_taken_alone(mechanism):
    """Analysis asks for slices of queries; their decays must not depend on where the slice starts."""
    q, k, _ = arrays(30)
    segments = np.int32([[0] * 4 + [1] * 10 + [2] * 16, [1] * 30])
    positions = np.int32([[*range(-4, 10), *range(16)], range(30)]).clip(0)
    vis, spec = seen(positions, segments, batch=2, length=30), mechanism.spec()
    whole = np.asarray(run(mechanism, "weights", spec, q, k, vis).values)
    rows = jax.jit(lambda vis: vis.rows(11, 7))(vis)
    close(run(mechanism, "weights", spec, q[:, 11:18], k, rows).values, whole[:, :, 11:18])


@BOTH
def test_the_state_has_one_size_and_ends_where_the_document_does(mechanism):
    spec, sizes = mechanism.spec(), set()
    q, k, v = inputs(24)
    for capacity in (24, 100_000):
        dims = dict(batch=2, capacity=capacity, heads=4, kv_heads=2, key_dim=16, value_dim=16, dtype=q.dtype)
        state = mechanism.init_state(spec, **dims)
        sizes.add(tuple(x.size for x in jax.tree.leaves(state)))
        segments = np.int32([[1] * 10 + [2] * 14, [5] * 20 + [0] * 4])
        _, state = run(mechanism, "step", spec, state, q, k, v, default_positions(2, 24), segments)
        sizes.add(tuple(x.size for x in jax.tree.leaves(state)))
        np.testing.assert_array_equal(state.segment, [2, 5])
        assert state.S.dtype == jnp.float32
    assert len(sizes) == 1


@BOTH
def test_calls_that_cannot_be_served_are_refused(mechanism):
    q, k, v = inputs(12)
    spec, zero = mechanism.spec(), lambda a, b: jnp.zeros((1, 1, a.shape[1], b.shape[1]))
    vis = self_visibility(2, 12)
    calls = [
        ("noncausal_self", self_visibility(2, 12, causal=False), {}),
        ("window", self_visibility(2, 12, window=4), {}),
        ("prefix", self_visibility(2, 12, prefix_len=jnp.array([2, 2])), {}),
        ("position_bias", vis, {"bias": zero}),
    ]
    for capability, rules, options in calls:
        for function in (mechanism.forward, mechanism.reference):
            with pytest.raises(NotImplementedError, match=f"^{mechanism.name} does not support {capability}\\.$"):
                function(q, k, v, rules, Call(spec, **options))
    for function in (mechanism.forward, mechanism.reference):
        with pytest.raises(NotImplementedError, match="causal_cross"):
            function(q[:, 4:], k, v, vis.rows(4, 8), Call(spec))
    dims = dict(batch=2, capacity=12, heads=4, kv_heads=2, key_dim=16, value_dim=16, dtype=q.dtype)
    state = mechanism.init_state(spec, **dims)
    for capability, options in (("window", {"window": 4}), ("position_bias", {"bias": zero})):
        with pytest.raises(NotImplementedError, match=capability):
            mechanism.step(state, q, k, v, vis.q_positions, vis.q_segments, Call(spec, **options))


@BOTH
def test_global_keys_are_a_document_of_their_own(mechanism):
    q, k, v = arrays(20)
    segments = np.ones((2, 20), np.int32)
    segments[:, 0] = GLOBAL
    vis, spec = seen(segments=segments, batch=2, length=20), mechanism.spec()
    o = np.asarray(run(mechanism, "forward", spec, q, k, v, vis))
    alone = seen(batch=2, length=19)
    close(o[:, 1:], run(mechanism, "forward", spec, q[:, 1:], k[:, 1:], v[:, 1:], alone))
    close(run(mechanism, "reference", spec, q, k, v, vis), o)


def test_bad_options_name_the_field_and_the_remedy():
    with pytest.raises(ConfigError, match=r"lightning.slopes is 'alibi' but must be one of official, paper, minimax"):
        Spec(slopes="alibi")
    with pytest.raises(ConfigError, match=r"lightning.feature is 'relu' but must be one of silu, identity"):
        Spec(feature="relu")
    with pytest.raises(ConfigError, match=r"linear.feature is 'exp' but must be one of elu1"):
        LINEAR.make_spec(feature="exp")
    with pytest.raises(ConfigError, match=r"'silu' with normalise=True.*set normalise=False"):
        LINEAR.make_spec(feature="silu")


def test_flops_grow_with_the_length_not_its_square():
    count = lambda n: LIGHTNING.flops(Spec(), batch=1, queries=n, keys=n, heads=2, key_dim=64, value_dim=64)
    assert count(8192) == 4 * count(2048)
    assert count(2048) == 2 * 2 * 2048 * (64 * 128 + 2 * 64 * 64)


@pytest.mark.parametrize("layer", [1, 3])
def test_minimax_parity(layer):
    """The torch layer of transformers on random weights: its heads before the norm, and its state."""
    torch = pytest.importorskip("torch", reason="torch is not installed: the MiniMax layer is torch code")
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax", reason="transformers is needed")
    torch.manual_seed(0)
    heads, dim, length = 6, 8, 37
    cfg = minimax.MiniMaxConfig(
        hidden_size=heads * dim, num_attention_heads=heads, head_dim=dim, num_hidden_layers=4, block_size=16
    )
    theirs = minimax.MiniMaxLightningAttention(cfg, layer).eval()
    heads_of = {}
    theirs.norm.register_forward_pre_hook(lambda module, args: heads_of.update(heads=args[0]))
    x = torch.randn(2, length, heads * dim)
    with torch.no_grad():
        _, state = theirs(x, None, None)
        qkv = theirs.qkv_proj(x).reshape(2, length, heads, 3 * dim)
    q, k, v = (jnp.asarray(part.numpy()) for part in qkv.split(dim, dim=3))
    spec, depth = Spec(slopes="minimax"), (layer, 4)
    dims = dict(batch=2, capacity=length, heads=heads, kv_heads=heads, key_dim=dim, value_dim=dim, dtype=q.dtype)
    ones = jnp.ones((2, length), jnp.int32)
    state0 = LIGHTNING.init_state(spec, **dims)
    v = jax.nn.silu(v)  # MiniMax activates its values too, which is the layer's business
    o, ours = run(LIGHTNING, "step", spec, state0, q, k, v, default_positions(2, length), ones, depth=depth)
    close(np.asarray(o).reshape(2, length, -1), heads_of["heads"].numpy(), rtol=1e-5)
    close(ours.S, state.numpy(), rtol=1e-5)
