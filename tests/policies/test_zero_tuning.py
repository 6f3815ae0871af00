"""ZeroTuning: three forms of one operator, what it leaves alone, and that it goes with every policy."""

from __future__ import annotations

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis import look
from jaxattn.errors import ConfigError, DataError
from jaxattn.head_tables import read_head_tables, with_head_tables
from jaxattn.masks import self_visibility
from jaxattn.mechanisms import get as mechanism
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.stream import Stream
from jaxattn.policies import get, names, resolve, text_of
from tests.conformance.model import params_of
from tests.conformance.policies.cases import BASE, LENGTH, PROMPT, decode, small, texts
from tests.decoding import core_of, site_of

POLICY = get("zero_tuning")
GAMMA = 3.0


def arrays(seed=0, batch=2, length=11, heads=4, kv_heads=2, dim=8):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.standard_normal((batch, length, n, dim)).astype(np.float32)
    return draw(heads), draw(kv_heads), draw(kv_heads)


def attended(q, k, v, gamma, heads=None, segments=None):
    """The layer's attention under the policy, through its wrapped core."""
    core = core_of(mechanism("softmax"), q.shape[3])
    core = POLICY.wrap(
        core, Stream(None, None, heads=heads or {}), spec=POLICY.spec(gamma=gamma), site=site_of(q, k, v)
    )
    places = None if segments is None else jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    vis = self_visibility(*q.shape[:2], segment_ids=segments, positions=places)
    return np.asarray(core.whole(core.queries(jnp.asarray(q)), core.keys(jnp.asarray(k)), jnp.asarray(v), vis))


def rows_of(q, k):
    """Softmax rows [B, H, T, S] in f64, causal, by NumPy."""
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = np.einsum("bthd,bshd->bhts", q.astype(np.float64), k.astype(np.float64)) / q.shape[3] ** 0.5
    s = np.where(np.tril(np.ones(s.shape[2:], bool)), s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    return w / w.sum(-1, keepdims=True)


def scaled(a, gamma):
    """The paper's rows: column 0 times γ, and normalised again."""
    new = a.copy()
    new[..., 0] *= gamma
    return new / (1 + (gamma - 1) * a[..., :1])


@pytest.mark.parametrize("gamma", [0.3, 1.5, 4.0])
def test_scores_and_probabilities_and_the_epilogue_agree(gamma):
    q, k, v = arrays()
    a = rows_of(q, k)
    wide = np.repeat(v, 2, axis=2)
    by_rows = np.einsum("bhts,bshv->bthv", scaled(a, gamma), wide)
    first, plain = np.moveaxis(a[..., 0], 1, 2)[..., None], np.einsum("bhts,bshv->bthv", a, wide)
    epilogue = (plain + (gamma - 1) * first * wide[:, :1]) / (1 + (gamma - 1) * first)
    np.testing.assert_allclose(epilogue, by_rows, atol=1e-12)
    np.testing.assert_allclose(attended(q, k, v, gamma), by_rows, atol=1e-6)


def test_a_gamma_of_one_is_the_same_bit_for_bit():
    q, k, v = (jnp.asarray(x) for x in arrays())
    core = core_of(mechanism("softmax"), 8)
    np.testing.assert_array_equal(attended(q, k, v, 1.0), core.whole(q, k, v, self_visibility(*q.shape[:2])))


def test_the_first_row_stays_and_the_others_lose_to_the_first_token():
    """Values that are one-hot by token show the rows themselves."""
    q, k, _ = arrays(length=8)
    v = np.broadcast_to(np.eye(8, dtype=np.float32)[None, :, None], (2, 8, 2, 8))
    rows = {gamma: attended(q, k, v, gamma) for gamma in (0.5, 1.0, 2.0, 4.0)}  # [B, T, H, token]
    np.testing.assert_allclose(rows[4.0][:, 0], rows[1.0][:, 0], atol=1e-7)
    ratio = lambda a: a[:, 4:, :, 2] / a[:, 4:, :, 1]
    np.testing.assert_allclose(ratio(rows[4.0]), ratio(rows[1.0]), rtol=2e-5)
    rest = [rows[gamma][:, 1:, :, 1:].sum(-1) for gamma in (0.5, 1.0, 2.0, 4.0)]
    assert all((a > b).all() for a, b in pairwise(rest))


def test_it_moves_what_has_a_sink_and_hardly_what_has_none():
    q, k, v = arrays()
    moved = []
    for size in (6.0, -6.0):  # of the first key along all queries
        q2, k2 = q.copy(), k.copy()
        q2[..., 0], k2[:, 0, :, 0] = 3.0, size
        moved.append(np.abs(attended(q2, k2, v, 4.0) - attended(q2, k2, v, 1.0))[:, 4:].max())
    assert moved[0] > 0.05
    assert moved[1] < 0.02 * moved[0]


def test_heads_have_factors_of_their_own():
    q, k, v = arrays()
    gammas = np.array([0.5, 1.0, 2.0, 4.0], np.float32)
    found = attended(q, k, v, 7.0, heads={"zero_tuning": jnp.asarray(gammas)})
    for head, gamma in enumerate(gammas):
        np.testing.assert_allclose(found[:, :, head], attended(q, k, v, float(gamma))[:, :, head], atol=1e-6)


def test_the_first_token_is_the_first_that_is_no_padding():
    q, k, v = arrays(length=11)
    segments = jnp.asarray(np.tile(np.arange(11) >= 3, (2, 1)), jnp.int32)
    padded = attended(*(np.concatenate([x[:, 8:], x[:, :8]], axis=1) for x in (q, k, v)), GAMMA, segments=segments)
    np.testing.assert_allclose(padded[:, 3:], attended(*(x[:, :8] for x in (q, k, v)), GAMMA), atol=1e-6)


# --- through a model


def model(policy="", **fields):
    return ModelConfig(**(BASE | {"policy": policy} | fields))


@functools.partial(jax.jit, static_argnums=0)
def forward(cfg, variables, *inputs):
    return Decoder(cfg).apply(variables, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def maps(cfg, variables, tokens):
    """Of each layer: rows, the output that they stand for, and the layer's."""
    layers = look(cfg, variables, tokens).attention
    return [(layer.weights().values, layer.rebuild(), layer.heads_out) for layer in layers]


@functools.cache
def oracle(mixer: str, gamma: float) -> np.ndarray:
    """Logits of the forward pass with log γ on column 0 of every layer's dense scores, as a position bias."""
    cfg = model(mixers=(mixer,))
    bias = lambda q, k: jnp.where(k[:, None, None] == 0, jnp.log(gamma), 0.0) * jnp.ones((1, 1, q.shape[1], 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxattn.nn.attention.position_bias", lambda cfg, table: bias)
        run = jax.jit(lambda variables, *inputs: Decoder(cfg).apply(variables, *inputs))
        return np.asarray(run({"params": params_of(cfg)}, *texts()))


@pytest.mark.parametrize("mixer", ["softmax", "k_bias"])
def test_decoding_and_forward_equal_a_dense_score_space_model(mixer):
    own = texts()[2] > 0
    cfg = model(f"zero_tuning(gamma={GAMMA})", mixers=(mixer,))
    expected = oracle(mixer, GAMMA)[own]
    found = forward(cfg, {"params": params_of(cfg)}, *texts())
    np.testing.assert_allclose(np.asarray(found)[own], expected, atol=1e-5)
    np.testing.assert_allclose(decode(cfg)[0][own], expected, atol=1e-5)


KEEPERS = [name for name in names() if get(name).step is not None and name != "dense"]


@pytest.mark.parametrize("keeper", KEEPERS)
def test_it_goes_with_every_policy_that_keeps(keeper):
    """With a budget that holds everything it is ZeroTuning over dense attention; with a small one the first token of
    a text, where it is kept, still gets its factor."""
    policy, own = get(keeper), texts()[2] > 0
    spec = policy.unlimited(small(policy), LENGTH)
    cfg = model(f"zero_tuning(gamma={GAMMA}), {text_of(policy, spec)}")
    np.testing.assert_allclose(decode(cfg)[0][own], oracle("softmax", GAMMA)[own], atol=2e-5)
    few = text_of(policy, small(policy))
    with_it, without = (decode(model(text))[0][0, PROMPT:] for text in (f"zero_tuning(gamma=20.0), {few}", few))
    assert np.abs(with_it - without).max() > 1e-3


def test_attention_maps_show_it():
    cfg = model("zero_tuning(gamma=5.0)")
    params, tokens = {"params": params_of(cfg)}, texts()[0][:1]
    found, plain = maps(cfg, params, tokens), maps(model(), params, tokens)
    for _, rebuilt, out in found:
        np.testing.assert_allclose(rebuilt, out, atol=1e-5)
    np.testing.assert_allclose(found[0][0], scaled(np.asarray(plain[0][0], np.float64), 5.0), atol=1e-6)
    with pytest.raises(ConfigError, match="policy streaming leaves keys out"):
        look(model("streaming(sinks=1, recent=4)"), params, jnp.asarray(tokens))


def test_a_table_of_heads_reaches_its_layers(tmp_path):
    cfg, params = model("zero_tuning"), {"params": params_of(model())}
    path, rows, tokens = tmp_path / "heads.json", np.ones((4, 4)), texts()[0][:1]
    rows[2, 1] = 9.0
    path.write_text(f'{{"zero_tuning": {rows.tolist()}}}')
    a = maps(cfg, with_head_tables(cfg, params, read_head_tables(path, cfg)), tokens)
    b = maps(model(), params, tokens)
    for layer in (0, 1):
        np.testing.assert_allclose(a[layer][0], b[layer][0], atol=1e-6)
    changed = np.abs(np.subtract(a[2][0], b[2][0])).max((0, 2, 3))
    assert changed[1] > 1e-2
    assert changed[[0, 2, 3]].max() < 1e-6
    path.write_text('{"zero_tuning": [[1, 2]]}')
    with pytest.raises(ConfigError, match=r"zero_tuning.* has shape \[1, 2\] but must be finite numbers \[4, 4\]"):
        read_head_tables(path, cfg)
    for text, words in ((None, "missing"), ("{", "heads.json")):
        path.unlink()
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=f"{words}.*name a file of head tables") as refused:
            read_head_tables(path, cfg)
        assert "\n" not in str(refused.value)
        path.touch()


def test_layers_outside_its_range_are_left_alone():
    params, tokens = {"params": params_of(model())}, texts()[0][:1]
    a, b = (maps(cfg, params, tokens) for cfg in (model("zero_tuning(gamma=9.0, first=1, last=1)"), model()))
    np.testing.assert_array_equal(a[0][0], b[0][0])
    assert np.abs(np.subtract(a[1][0], b[1][0])).max() > 1e-2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("zero_tuning(gamma=0)", "gamma is 0.0 but must be positive"),
        ("zero_tuning(gamma=-2)", "gamma is -2.0"),
        ("zero_tuning(first=3, last=1)", "layers in order"),
        ("zero_tuning(gama=2)", "did you mean 'gamma'"),
        ("dense, zero_tuning", "as its last"),
    ],
)
def test_impossible_options_are_one_sentence(text, words):
    with pytest.raises(ConfigError, match=words):
        resolve(text)


def test_layers_it_does_not_have_and_weights_without_scores_are_refused():
    with pytest.raises(ConfigError, match="layers 0 to 3, so first=0 and last=7"):
        model("zero_tuning(last=7)")
    cfg = model("zero_tuning", mixers=("relu",))
    with pytest.raises(ConfigError, match="which relu does not take"):
        forward(cfg, {"params": params_of(model(mixers=("relu",)))}, texts()[0])
