"""Steering against weights that are scaled and divided again, and the tags of a chat against its template."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError
from jaxattn.head_tables import with_head_tables
from jaxattn.masks import self_visibility
from jaxattn.mechanisms import get
from jaxattn.models import ModelConfig
from jaxattn.nn.stream import NO_PROMPT, OTHER, USER, Stream
from jaxattn.policies import steer
from jaxattn.reader import hidden_in_one_pass, hidden_one_by_one
from tests.conformance.model import params_of
from tests.decoding import core_of, site_of
from tests.policies.key_heads import DIM, HEADS, KV_HEADS, arrays

LENGTH, PROMPT = 18, 13
TAGS = np.array([OTHER, OTHER, USER, USER, USER, OTHER, USER, USER, OTHER, OTHER, USER, OTHER, OTHER], np.int32)
Q, K, V = arrays(LENGTH)
VIS = self_visibility(2, LENGTH)


def steered(spec: steer.Spec, *, heads=None, tags=TAGS, phase="prompt", v=V, layer=0):
    """o [B, T, H, V] by the core."""
    rows = None if tags is None else jnp.broadcast_to(jnp.asarray(tags), (2, len(tags)))
    here = Stream(VIS.q_positions, VIS.q_segments, heads=heads or {}, tags=rows, phase=phase)
    site = site_of(Q, K, v)
    site = site.__class__(**{**site.__dict__, "layer": layer, "num_layers": 4})
    core = steer.wrap(core_of(get("softmax"), DIM), here, spec=spec, site=site)
    return np.asarray(core.whole(jnp.asarray(Q), jnp.asarray(K), jnp.asarray(v), VIS))


def weights() -> np.ndarray:
    """Softmax rows [B, H, T, S] in f64."""
    k = np.repeat(K.astype(np.float64), HEADS // KV_HEADS, axis=2)
    s = np.einsum("bthd,bshd->bhts", Q.astype(np.float64), k) / DIM**0.5
    w = np.where(np.tril(np.ones((LENGTH, LENGTH))), np.exp(s - s.max()), 0.0)
    return w / w.sum(-1, keepdims=True)


def scaled(alpha, tags: tuple[int, ...]) -> np.ndarray:
    """The same times alpha [H] in the prompt's columns of these tags, every row divided by its sum again."""
    columns = np.isin(np.pad(TAGS, (0, LENGTH - PROMPT)), tags)
    w = weights() * np.where(columns, np.broadcast_to(alpha, HEADS)[:, None, None], 1.0)
    return w / w.sum(-1, keepdims=True)


def outputs(w: np.ndarray, v: np.ndarray = V) -> np.ndarray:
    return np.einsum("bhts,bshv->bthv", w, np.repeat(v.astype(np.float64), HEADS // KV_HEADS, axis=2))


@pytest.mark.parametrize(("mode", "tags"), [("exclude", (OTHER,)), ("include", (USER,)), ("prompt", (OTHER, USER))])
def test_it_is_weights_scaled_and_divided_again(mode, tags):
    """Columns behind the prompt are left alone in every mode, and rows in front of the first steered one too."""
    found = steered(steer.Spec(alpha=0.3, mode=mode))
    np.testing.assert_allclose(found, outputs(scaled(0.3, tags)), atol=3e-6)


def test_alpha_of_one_is_nothing_and_of_almost_zero_hides_the_columns():
    assert steered(steer.Spec(alpha=1.0)).tolist() == steered(steer.Spec(alpha=0.5, first=1)).tolist()
    found = steered(steer.Spec(alpha=1e-30))
    hidden = weights() * ~np.isin(np.pad(TAGS, (0, LENGTH - PROMPT)), (OTHER,))
    seen = hidden.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        found, outputs(np.where(seen > 0, hidden / np.maximum(seen, 1e-300), weights())), atol=3e-6
    )


def test_the_users_share_grows_as_alpha_falls():
    share = np.zeros_like(V)
    share[:, :PROMPT] = (TAGS == USER)[:, None, None]
    found = [steered(steer.Spec(alpha=a), v=share)[:, 3:, :, 0] for a in (1.0, 0.7, 0.4, 0.1)]
    for more, less in itertools.pairwise(found):
        assert (less > more).all()


def test_a_table_is_by_head_and_compounding_by_layer():
    alpha = np.array([0.2, 1.0, 0.5, 3.0], np.float32)
    found = steered(steer.Spec(), heads={"steer": jnp.asarray(alpha)})
    np.testing.assert_allclose(found, outputs(scaled(alpha, (OTHER,))), atol=3e-6)
    found = steered(steer.Spec(alpha=0.8, compound=True), layer=2)
    np.testing.assert_allclose(found, outputs(scaled(0.8**3, (OTHER,))), atol=3e-6)


def test_answers_alone_leave_the_prompt():
    spec = steer.Spec(alpha=0.3, phases="answers")
    np.testing.assert_array_equal(steered(spec), steered(steer.Spec(alpha=1.0)))
    np.testing.assert_array_equal(steered(spec, phase="answer"), steered(steer.Spec(alpha=0.3)))


SMALL = {"vocab_size": 17, "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "d_ff": 8}


def test_the_forward_pass_and_decoding_agree_around_every_kind_of_cache():
    tokens = np.random.default_rng(1).integers(0, 17, (2, LENGTH))
    tags = {"tags": {"prompt": np.stack([TAGS, np.roll(TAGS, 3)])}}
    plain = ModelConfig(**SMALL, policy="steer(alpha=0.2)")
    table = np.random.default_rng(3).uniform(0.1, 3.0, (2, 4)).astype(np.float32)
    variables = with_head_tables(plain, {"params": params_of(plain)}, {"steer": table}) | tags
    whole = np.asarray(hidden_in_one_pass(plain, variables, jnp.asarray(tokens)))
    for policy in ("", ", streaming(sinks=2, recent=20)", ", h2o(heavy=4, recent=18)", ", duo(full='1.2', recent=20)"):
        model = ModelConfig(**SMALL, policy=plain.policy + policy)
        found = np.asarray(hidden_one_by_one(model, variables, tokens, prefill=PROMPT))
        np.testing.assert_allclose(found, whole, atol=1e-5, err_msg=policy)
    for row in (0, 1):
        own = variables | {"tags": {"prompt": tags["tags"]["prompt"][row : row + 1]}}
        alone = hidden_in_one_pass(plain, own, jnp.asarray(tokens[row : row + 1]))
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-5, err_msg="a row has its own tags")
    other = variables | {"tags": {"prompt": tags["tags"]["prompt"][::-1]}}
    assert np.abs(np.asarray(hidden_in_one_pass(plain, other, jnp.asarray(tokens))) - whole).max() > 1e-3


def test_without_tags_it_says_where_they_come_from():
    with pytest.raises(ConfigError, match="--chat"):
        steered(steer.Spec(), tags=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0.0}, "steer.alpha is 0.0"),
        ({"alpha": float("nan")}, "positive and finite"),
        ({"mode": "half"}, "exclude, include, prompt"),
        ({"phases": "x"}, "all, answers"),
        ({"first": -1}, "first -1"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        steer.Spec(**options)


def test_tags_beyond_the_prompt_are_none():
    assert NO_PROMPT not in (OTHER, USER)
    short = steered(steer.Spec(alpha=0.3, mode="prompt"), tags=TAGS[:5])
    long = steered(steer.Spec(alpha=0.3, mode="prompt"), tags=np.pad(TAGS[:5], (0, 9), constant_values=NO_PROMPT))
    np.testing.assert_array_equal(short, long)
