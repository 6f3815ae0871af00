"""Masked heads against models whose queries or head outputs are zero, in every policy and phase."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.analysis import look
from jaxattn.analysis.answers import read_prompts
from jaxattn.errors import ConfigError
from jaxattn.head_tables import with_head_tables
from jaxattn.masks import self_visibility
from jaxattn.mechanisms import get as mechanism
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.stream import Edit, Stream
from jaxattn.policies import get, names, text_of
from tests.conformance.model import params_of
from tests.conformance.policies.cases import BASE, LENGTH, PROMPT, decode, small, start, step, texts
from tests.decoding import core_of, site_of

POLICY = get("mask_heads")
HEADS = ((0, 1), (1, 2), (1, 3))
NAMED = " ".join(f"{layer}-{head}" for layer, head in HEADS)


def model(policy="", **fields):
    return ModelConfig(**(BASE | {"num_layers": 2, "policy": policy} | fields))


@functools.cache
def oracle(uniform=(), zero=()) -> np.ndarray:
    """Logits of the plain forward pass of a model whose heads are masked by other means: by parameters of queries that
    are 0, where nothing is added to these, and by editing heads."""
    params = jax.tree.map(np.array, params_of(model()))
    for layer, head in uniform:
        params[f"layer_{layer}"]["attn"]["q"]["kernel"][:, 8 * head : 8 * head + 8] = 0
    edits = tuple(Edit(layer, "head", head) for layer, head in zero)
    run = jax.jit(lambda params, *inputs: Decoder(model()).apply({"params": params}, *inputs, edits=edits))
    return np.asarray(run(params, *texts()))


def attended(spec, segments=None, phase="prompt", heads=None):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 9, n, 8)), jnp.float32) for n in (4, 2, 2))
    core = core_of(mechanism("softmax"), 8)
    here = Stream(None, None, heads=heads or {}, phase=phase)
    core = POLICY.wrap(core, here, spec=spec, site=site_of(q, k, v))
    vis = self_visibility(2, 9, segment_ids=segments)
    return np.asarray(core.whole(core.queries(q), core.keys(k), v, vis)), np.repeat(np.asarray(v), 2, axis=2)


def test_a_uniform_head_gives_the_mean_of_what_it_sees_and_a_zero_head_nothing():
    segments = jnp.asarray(np.tile(np.arange(9) >= 3, (2, 1)), jnp.int32)
    plain, v = attended(POLICY.spec(top=0), segments)
    uniform, _ = attended(POLICY.spec(heads="0-1 0-2"), segments)
    silent, _ = attended(POLICY.spec(heads="0-1 0-2", by="zero"), segments)
    means = np.cumsum(v[:, 3:], axis=1) / np.arange(1, 7)[:, None, None]
    np.testing.assert_allclose(uniform[:, 3:, 1:3], means[:, :, 1:3], atol=1e-6)
    assert not silent[:, :, 1:3].any()
    for found in (uniform, silent):
        np.testing.assert_array_equal(found[:, :, [0, 3]], plain[:, :, [0, 3]])


@pytest.mark.parametrize("by", ["uniform", "zero"])
def test_decoding_and_forward_equal_a_model_without_these_queries_or_outputs(by):
    own = texts()[2] > 0
    cfg = model(f"mask_heads(heads='{NAMED}', by={by})")
    forward = jax.jit(lambda params, *inputs: Decoder(cfg).apply({"params": params}, *inputs))
    expected = oracle(**{by: HEADS})[own]
    np.testing.assert_allclose(np.asarray(forward(params_of(cfg), *texts()))[own], expected, atol=1e-5)
    np.testing.assert_allclose(decode(cfg)[0][own], expected, atol=1e-5)
    assert np.abs(expected - oracle()[own]).max() > 1e-2


@pytest.mark.parametrize("keeper", [name for name in names() if get(name).step is not None and name != "dense"])
def test_it_goes_with_every_policy_that_keeps(keeper):
    policy, own = get(keeper), texts()[2] > 0
    spec = policy.unlimited(small(policy) if keeper != "tidal" else policy.spec(first=0, again=1), LENGTH)
    both = "mask_heads(heads='0-1'), mask_heads(heads='1-2 1-3', by=zero)"
    found = decode(model(f"{both}, {text_of(policy, spec)}"))[0]
    np.testing.assert_allclose(found[own], oracle(HEADS[:1], HEADS[1:])[own], atol=2e-5)


def test_in_answers_alone_a_prompt_has_all_heads():
    """And behind a prompt that was read by another model, an answer is as this one's."""
    cfg, own = model(f"mask_heads(heads='{NAMED}', phases=answers)"), texts()[2] > 0
    found, plain, always = (decode(c)[0] for c in (cfg, model(), model(f"mask_heads(heads='{NAMED}')")))
    np.testing.assert_allclose(found[:, :PROMPT][own[:, :PROMPT]], plain[:, :PROMPT][own[:, :PROMPT]], atol=1e-6)
    assert np.abs(found[0, PROMPT:] - plain[0, PROMPT:]).max() > 1e-3
    assert np.abs(found[0, PROMPT:] - always[0, PROMPT:]).max() > 1e-3
    params, cut = params_of(cfg), lambda a, b: (jnp.asarray(x[:, a:b]) for x in texts())
    _, states = step(model(), "prompt", params, start(model(), 3, LENGTH, params), *cut(0, PROMPT))
    masked = model(f"mask_heads(heads='{NAMED}')")
    logits, _ = step(masked, "answer", params, states, *cut(PROMPT, PROMPT + 1))
    np.testing.assert_allclose(logits[:, 0], found[:, PROMPT], atol=1e-6)


def test_a_table_numbers_heads_in_the_order_of_masking():
    """One program masks the first two or other heads; the names say the same."""
    cfg, order = model("mask_heads(top=2)"), np.zeros((2, 4), np.float32)
    order[0, 1], order[1, 2], order[1, 0] = 1, 2, 3
    run = jax.jit(lambda variables, *inputs: Decoder(cfg).apply(variables, *inputs))
    with_table = lambda order: run(with_head_tables(cfg, params_of(model()), {"mask_heads": order}), *texts())
    own = texts()[2] > 0
    np.testing.assert_allclose(np.asarray(with_table(order))[own], oracle(((0, 1), (1, 2)))[own], atol=1e-5)
    np.testing.assert_allclose(np.asarray(with_table(0 * order))[own], oracle()[own], atol=1e-5)
    with pytest.raises(ConfigError, match=r"first 2 heads of the head table 'mask_heads', which is not there: give"):
        run({"params": params_of(model())}, *texts())


def test_layers_that_share_programs_are_masked_each_for_itself():
    """`jaxattn.generate` reads prompts layer by layer."""
    params, prompt = jax.tree.map(jnp.asarray, params_of(model())), texts()[0][:, :PROMPT]
    named = model("mask_heads(heads='0-1 1-2 1-3')")
    found = read_prompts(named, params, prompt.tolist(), room=8).logits
    np.testing.assert_allclose(np.asarray(found)[[0, 2]], oracle(HEADS)[[0, 2], PROMPT - 1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": "16"}, "'16' but names heads as layer-head"),
        ({"heads": "1-2 a-3"}, "'a-3' but"),
        ({"heads": "1-2-3"}, "'1-2-3' but"),
        ({"top": -1}, "top is -1 but"),
        ({"by": "nothing"}, "by is 'nothing' but must be one of uniform, zero"),
        ({"phases": "prompt"}, "phases is 'prompt' but must be one of all, answers"),
    ],
)
def test_impossible_options_are_one_sentence(options, words):
    with pytest.raises(ConfigError, match=words):
        POLICY.spec(**options)


def test_heads_that_are_not_there_and_models_it_cannot_serve_are_refused():
    for text in ("0-4", "2-0"):
        with pytest.raises(ConfigError, match=f"no head {text}: layers are 0 to 1 and heads 0 to 3"):
            model(f"mask_heads(heads='{text}')")
    with pytest.raises(ConfigError, match="no head is uniform; use by='zero'"):
        model("mask_heads(heads='0-0')", position="alibi")
    relu = model("mask_heads(heads='0-0')", mixers=("relu",))
    params = jax.tree.map(jnp.asarray, params_of(model(mixers=("relu",))))
    with pytest.raises(ConfigError, match="no weights in relu; use by='zero'"):
        Decoder(relu).apply({"params": params}, *map(jnp.asarray, texts()))
    with pytest.raises(ConfigError, match="policy mask_heads changes what heads do"):
        look(model("mask_heads(heads='0-0')"), {"params": params}, jnp.asarray(texts()[0]))
