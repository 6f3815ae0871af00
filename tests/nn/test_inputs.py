"""Every bad input of `attend`, `Decoder.apply`, `look` and `generate` is refused with one sentence that names it."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxattn
from jaxattn import checks
from jaxattn.analysis import look
from jaxattn.errors import ConfigError, UserError
from jaxattn.mechanisms import get, names, resolve_mixer
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.rope import Alibi, Rope, alibi_slopes
from tests.conformance.model import params_of

README = Path(__file__).parents[2] / "README.md"
BATCH, LENGTH = 2, 6
Q, K, V = (np.random.default_rng(i).standard_normal((BATCH, LENGTH, 4, 8), np.float32) for i in range(3))
CFG = ModelConfig(vocab_size=17, num_layers=1, d_model=16, num_heads=2, mixers=("k_bias",), tie_embeddings=True)
TOKENS = np.random.default_rng(3).integers(0, 17, (BATCH, LENGTH)).astype(np.int32)
IDS = np.ones((BATCH, LENGTH), np.int32)
PLACES = np.arange(LENGTH, dtype=np.int32)[None].repeat(BATCH, 0)


@pytest.fixture(autouse=True)
def as_users_call_it():
    """Without the tests' own shape checker in front."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def attend(name="softmax", q=Q, k=K, v=V, **kwargs):
    return jaxattn.attend(name, q, k, v, **kwargs)


def apply(tokens=TOKENS, params=None, cfg=CFG, **kwargs):
    return Decoder(cfg).apply({"params": params_of(cfg) if params is None else params}, tokens, **kwargs)


def looked(tokens=TOKENS, params=None, cfg=CFG, **kwargs):
    return look(cfg, params_of(cfg) if params is None else params, tokens, **kwargs)


def generate(tokens=TOKENS, params=None, cfg=CFG, **kwargs):
    params = params_of(cfg) if params is None else params
    return jaxattn.generate(cfg, params, tokens, **({"max_new_tokens": 2} | kwargs))


def refused(call, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    assert text.endswith(".")


def test_the_good_inputs_are_good():
    """Or everything below would be refused for another reason."""
    assert attend(positions=PLACES, segment_ids=IDS, prefix_len=np.array([2, 0])).shape == Q.shape
    for call in (apply, lambda **x: looked(**x).logits):
        assert call(positions=PLACES, segment_ids=IDS, prefix_len=np.array([2, 0])).shape == (BATCH, LENGTH, 17)
    assert generate().tokens.shape == (BATCH, 2)


# --- one number per token

READERS = {"attend": attend, "apply": apply, "look": looked}
IDENTITIES = {
    "positions-1d": (
        {"positions": PLACES[0]},
        r"positions has shape \[6\] but must be \[batch, length\]; positions\[None",
    ),
    "positions-long": ({"positions": np.arange(14).reshape(2, 7)}, r"positions has shape \[2, 7\] but .* has \[2, 6\]"),
    "positions-float": ({"positions": PLACES * 1.0}, r"positions is float64 but must be integers"),
    "positions-list": ({"positions": PLACES.tolist()}, "positions is a list but must be an array"),
    "positions-number": ({"positions": 3}, "positions is 3, a int, but must be an array"),
    "positions-negative": ({"positions": PLACES - 1}, "positions holds -1 but must be 0 or more"),
    "positions-fall": ({"positions": PLACES[:, ::-1].copy()}, "positions fall from 5 to 4 at row 0, place 1"),
    "segment_ids-1d": ({"segment_ids": IDS[0]}, r"segment_ids has shape \[6\] but must be \[batch, length\]"),
    "segment_ids-long": ({"segment_ids": np.ones((2, 9), np.int32)}, r"segment_ids has shape \[2, 9\] but"),
    "segment_ids-other-batch": ({"segment_ids": np.ones((1, 6), np.int32)}, r"segment_ids has shape \[1, 6\] but"),
    "segment_ids-bool": ({"segment_ids": IDS > 0}, r"segment_ids is bool but must be integers: use segment_ids.astype"),
    "segment_ids-list": ({"segment_ids": IDS.tolist()}, "segment_ids is a list"),
    "segment_ids-negative": ({"segment_ids": -2 * IDS}, "segment_ids holds -2 but must be"),
    "prefix_len-int": ({"prefix_len": 3}, r"prefix_len is 3 but must be integers \[batch\]: pass jnp.full\(2, 3\)"),
    "prefix_len-2d": ({"prefix_len": IDS}, r"prefix_len has shape \[2, 6\] but must be \[batch\]"),
    "prefix_len-rows": ({"prefix_len": np.array([1, 2, 3])}, r"prefix_len has shape \[3\] but there are 2 rows"),
    "prefix_len-negative": ({"prefix_len": np.array([1, -2])}, "prefix_len holds -2"),
    "prefix_len-float": ({"prefix_len": np.array([1.0, 2.0])}, "prefix_len is float64"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bad", IDENTITIES)
def test_positions_segments_and_prefixes(reader, bad):
    kwargs, sentence = IDENTITIES[bad]
    refused(functools.partial(READERS[reader], **kwargs), sentence)


def test_shapes_are_checked_while_a_program_is_traced_and_values_are_not():
    with pytest.raises(ConfigError, match=r"positions has shape \[2, 7\]"):
        jax.eval_shape(lambda p: attend(positions=p), jax.ShapeDtypeStruct((2, 7), jnp.int32))
    jax.eval_shape(lambda p: attend(positions=p), jax.ShapeDtypeStruct((2, 6), jnp.int32))
    shape = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)  # which has no values to read
    checks.ids("positions", shape, (BATCH, LENGTH), "q", segments=shape)
    checks.prefix_len(jax.ShapeDtypeStruct((BATCH,), jnp.int32), BATCH)
    checks.tokens(shape, 17)


# --- tokens and parameters of a model

MODELS = {"apply": apply, "look": looked, "generate": generate}
BAD_TOKENS = {
    "1d": (TOKENS[0], r"\[batch, length\]|\[B, T\]"),
    "3d": (TOKENS[None], r"\[batch, length\]|\[B, T\]"),
    "float": (TOKENS * 1.0, "float64"),
    "empty": (TOKENS[:, :0], "may be 0|none of them 0"),
    "no-rows": (TOKENS[:0], "may be 0|none of them 0"),
    "too-large": (TOKENS + 16, r"token \d+ is not in 0\.\.16"),
    "negative": (TOKENS - 17, r"token -\d+ is not in 0\.\.16"),
    "text": ("hello", "tokens"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bad", BAD_TOKENS)
def test_tokens(model, bad):
    tokens, sentence = BAD_TOKENS[bad]
    refused(lambda: MODELS[model](tokens=tokens), sentence)


@pytest.mark.parametrize("model", ["apply", "look"])
def test_lists_of_tokens(model):
    refused(lambda: MODELS[model](tokens=TOKENS.tolist()), "tokens is a list but must be an array")


def with_(params, value, *path):
    head, *rest = path
    return params | {head: with_(params.get(head, {}), value, *rest) if rest else value}


BAD_PARAMS = {
    "none": (lambda p: [], "variables are"),
    "number": (lambda p: 3, "variables are|params"),
    "empty": (lambda p: {}, "params are not those of this model"),
    "no-embedding": (lambda p: {k: v for k, v in p.items() if k != "embed"}, '"embed"'),
    "no-kernel": (lambda p: with_(p, {}, "layer_0", "attn", "q"), '"kernel" in scope "/layer_0/attn/q"|kernel'),
    "shape": (lambda p: with_(p, np.zeros((3, 3), np.float32), "layer_0", "attn", "q", "kernel"), r"\(3, 3\)|3"),
    "text": (lambda p: with_(p, "zero", "layer_0", "attn", "q", "kernel"), "kernel"),
    "mechanism-name": (lambda p: with_(p, {"kk": np.ones((2, 8))}, "layer_0", "attn", "mechanism"), "did you mean 'k'"),
    "mechanism-lacks": (lambda p: with_(p, {}, "layer_0", "attn", "mechanism"), "params lacks 'k'|named \"mechanism\""),
    "mechanism-shape": (
        lambda p: with_(p, {"k": np.ones((1, 8), np.float32)}, "layer_0", "attn", "mechanism"),
        r"'k' of k_bias( \(layer 0\))? is of shape \[1, 8\] but must be \[2, 8\]",
    ),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bad", BAD_PARAMS)
def test_parameters(model, bad):
    change, sentence = BAD_PARAMS[bad]
    refused(lambda: MODELS[model](params=change(params_of(CFG))), sentence)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_of_another_attention_are_not_dropped_in_silence(model):
    plain = dataclasses.replace(CFG, mixers=("softmax",))
    refused(lambda: MODELS[model](params=params_of(CFG), cfg=plain), r"softmax( \(layer 0\))? has no parameter 'k'")


def test_params_without_their_name_and_a_model_that_is_not_scanned():
    refused(lambda: Decoder(CFG).apply(params_of(CFG), TOKENS), r"must be \{'params': params\}")
    scanned = dataclasses.replace(CFG, scan_layers=True)
    refused(lambda: looked(cfg=scanned, params=params_of(CFG)), "have no 'layers'")


def test_more_tokens_than_learned_positions():
    cfg = dataclasses.replace(CFG, position="learned", max_positions=5)
    call = functools.partial(apply, cfg=cfg)
    refused(call, "position 5 is not among the 5 learned ones")
    refused(lambda: call(tokens=TOKENS[:, :2], positions=PLACES[:, 4:]), "position 5 is not among")
    assert call(tokens=TOKENS[:, :2], positions=PLACES[:, 3:5]).shape == (2, 2, 17)


# --- what attend alone takes

BIAS = np.zeros((1, 4, 6, 6), np.float32)
ATTEND = {
    "list": ({"q": Q.tolist()}, "q is a list but must be an array"),
    "3d": ({"q": Q[0]}, r"q has shape \[6, 4, 8\] but must be \[batch, length, heads, dim\]; q\[None\] adds"),
    "integers": ({"q": Q.astype(np.int32)}, "q is int32 but must be floating-point"),
    "no-tokens": ({"q": Q[:, :0], "k": K[:, :0], "v": V[:, :0]}, r"q has shape \[2, 0, 4, 8\]: no axis .* may be 0"),
    "no-keys": ({"k": K[:, :0], "v": V[:, :0]}, r"k has shape \[2, 0, 4, 8\]"),
    "heads": ({"k": K[:, :, :3], "v": V[:, :, :3]}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    "dims": ({"k": K[..., :4]}, "key dim of q is 8 but that of k is 4"),
    "k-and-v": ({"v": V[:, :5]}, r"k is .* and v is"),
    "batches": ({"k": K[:1], "v": V[:1]}, "q has batch 2 but k has 1"),
    "window-0": ({"window": 0}, "window is 0 but must be at least 1"),
    "window-float": ({"window": 2.5}, "window is 2.5 but"),
    "window-true": ({"window": True}, "window is True but"),
    "scale-text": ({"scale": "big"}, "scale is 'big' but must be a finite number"),
    "scale-nan": ({"scale": float("nan")}, "scale is nan"),
    "causal-text": ({"causal": "no"}, "causal is 'no' but must be True or False"),
    "bias-array": (
        {"bias": BIAS},
        r"bias is an array but must be a function .* lambda q_positions, k_positions: array",
    ),
    "backend": ({"backend": "fast"}, "'fast' is not known"),
    "name": ({"name": 7}, "the attention is 7 but must be the name"),
    "near-name": ({"name": "sofmax"}, "did you mean 'softmax'"),
    "mask": ({"mask": IDS}, "attend takes no mask: .* causal, window, prefix_len and segment_ids"),
    "attn_mask": ({"attn_mask": IDS}, "attend takes no attn_mask"),
    "segments": ({"segments": IDS}, "did you mean 'segment_ids'"),
    "is_causal": ({"is_causal": True}, "causal is it called here"),
    "near-option": ({"name": "sigmoid", "trainlen": 4}, "sigmoid has no option 'trainlen'; did you mean 'train_len'"),
    "params-of-nobody": ({"params": {"k": BIAS}}, "softmax has no parameter 'k'"),
    "no-params": ({"name": "k_bias"}, r"k_bias owns parameters \(k \[4, 8\]\)"),
    "wrong-params": ({"name": "k_bias", "params": {"q": BIAS}}, r"k_bias has no parameter 'q'"),
    "lacking-params": (
        {"name": "kv_bias", "params": {"k": BIAS[0, :, 0]}},
        "parameter 'k' of kv_bias is of shape|lacks",
    ),
    "params-list": ({"name": "k_bias", "params": [1]}, "params is a list but must be a dict of arrays"),
    "params-shape": (
        {"name": "k_bias", "params": {"k": BIAS[0, 0]}},
        r"'k' of k_bias is of shape \[6, 6\] but must be",
    ),
    "rope": ({"rope": Rope(100.0)}, "softmax takes no rope: rotate q and k before"),
    "rope-number": ({"name": "landmark", "rope": 100.0, "core": True}, "rope is 100.0 but must be a jaxattn.rope.Rope"),
    "depth": ({"depth": (0, 2)}, "softmax is the same at every depth"),
    "depth-number": ({"name": "lightning", "depth": 2}, r"depth is 2 but must be \(layer, number of layers\)"),
    "kv_positions-long": ({"kv_positions": np.zeros((2, 7), np.int32)}, r"kv_positions has shape \[2, 7\] but k has"),
}


@pytest.mark.parametrize("bad", ATTEND)
def test_attend(bad):
    kwargs, sentence = ATTEND[bad]
    refused(lambda: attend(**kwargs), sentence)


HEADS_FIRST = {  # [batch, heads, length, dim]
    "grouped": ((2, 4, 10, 8), (2, 2, 10, 8), {}, "looks like .*swap axes 1 and 2.*kv_positions"),
    "odd-groups": ((2, 6, 10, 8), (2, 2, 10, 8), {}, "looks like .*swap axes"),
    "all-heads": ((2, 4, 100, 8), (2, 4, 100, 8), {}, "100 heads of 4 tokens, which looks like .*swap axes"),
    "with-segments": (
        (2, 4, 10, 8),
        (2, 4, 10, 8),
        {"segment_ids": np.ones((2, 10), int)},
        "looks like .*swap its axes",
    ),
    "with-positions": (
        (2, 4, 10, 8),
        (2, 2, 10, 8),
        {"positions": np.ones((2, 10), int)},
        "looks like .*swap its axes",
    ),
}


@pytest.mark.parametrize("case", HEADS_FIRST)
def test_heads_in_front_of_tokens_are_noticed(case):
    q, k, kwargs, sentence = HEADS_FIRST[case]
    q, k = np.zeros(q, np.float32), np.zeros(k, np.float32)
    refused(lambda: attend(q=q, k=k, v=k, **kwargs), sentence)


def test_what_looks_like_it_and_is_meant_can_be_said():
    assert attend(q=Q, k=K[:, :3], v=V[:, :3], causal=False).shape == Q.shape  # fewer heads than tokens
    q, k = np.ones((2, 4, 6, 8), np.float32), np.ones((2, 2, 6, 8), np.float32)
    places = np.array([[0, 3], [0, 3]])
    assert attend(q=q, k=k, v=k, kv_positions=places).shape == (2, 4, 6, 8)
    many = np.ones((1, 2, 64, 8), np.float32)
    assert attend(q=many, k=many, v=many, positions=np.array([[0, 1]])).shape == many.shape


def test_good_calls_of_every_option_still_work():
    bias = Alibi(alibi_slopes(4))
    attend(bias=bias, scale=2, window=3, causal=np.bool_(True))
    fixed = attend(bias=lambda q, k: BIAS + 1.0)
    np.testing.assert_allclose(fixed, attend(), atol=1e-6)  # the same for all keys
    attend("lightning", depth=(1, 3))
    attend("landmark", rope=Rope(100.0), core=True, block=2)
    attend("sigmoid", train_len=np.int64(4))
    attend(segment_ids=np.array([[-1, 1, 1, 2, 2, 0]] * 2))


# --- what a layer adds

ADDED = {
    "transnormer": "the norm over all heads and the gate would be left out",
    "titans": "short convolution, the rates of every token and the gate would be left out",
    "landmark": "a learned landmark behind every 50 tokens would be left out",
    "sink_token": "1 learned token in front of the sequence would be left out",
}


@pytest.mark.parametrize("name", names())
def test_a_mechanism_that_is_more_than_attend_computes_says_so(name):
    mechanism = get(name)
    shapes = {"heads": 4, "kv_heads": 4, "key_dim": 8, "value_dim": 8}
    params = mechanism.init_params(jax.random.key(0), mechanism.spec(), **shapes)
    if name in ADDED:
        refused(lambda: attend(name, params=params), f"{name} is more than attend computes: .*{ADDED[name]}.*core=True")
    else:
        jax.eval_shape(lambda q: attend(name, q=q, params=params), Q)
    assert jax.eval_shape(lambda q: attend(name, q=q, params=params, core=True), Q).shape == Q.shape


def test_two_tokens_in_front():
    refused(lambda: attend("sink_token", tokens=2), "2 learned tokens in front")


# --- options

OPTIONS = {
    "sink_token(tokens=1.5)": "sink_token.tokens is 1.5 but must be a whole number",
    "sink_token(tokens=True)": "sink_token.tokens is True but must be a number",
    "sink_token(tokens=many)": "sink_token.tokens is 'many' but must be a number",
    "k_bias(key_dims=0.5)": "k_bias.key_dims is 0.5 but must be a whole number",
    "sigmoid(train_len=1e999)": "sigmoid.train_len is inf but must be a finite number",
    f"sigmoid(train_len=1{'0' * 400})": "sigmoid.train_len is 1000.* but must be a finite number",
    "sigmoid(train_len=99999999999)": "sigmoid.train_len is 99999999999 but must be at most 2147483647 in size",
    "titans(conv=2.5)": "titans.conv is 2.5 but must be a whole number",
    "lightning(slopes=3)": "lightning.slopes is 3 but must be text",
    "lightning(slopes=offical)": "lightning.slopes is 'offical' but must be one of official",
    "linear(normalise=1)": "linear.normalise is 1 but must be True or False",
    "linear(normalize=False)": "did you mean 'normalise'",
    "softmax(window=2.5)": "window is 2.5 but must be a whole number",
    "softmax(window=True)": "window is True but must be a whole number",
    "softmax(window=99999999999)": "window is 99999999999 but must be a whole number from 1 to",
    "conv(width=True)": "conv takes width alone",
    "softmax(p=print(1))": "the value of p must be a number, a word, 'text', True or False",
    "softmax(p=[1, 2])": "the value of p must be a number",
    "softmax(p=None)": "the value of p must be a number",
    "softmax(**{'p': 1})": "options are written option=value",
    "softmax(1)": "options are written option=value",
    "softmax(p=1)(2)": "options are written option=value",
    "softmax(p=1, p=2)": "p is given twice",
    "soft max": "is not NAME or NAME",
    "": "is not NAME or NAME",
    "(" * 5000: "is not NAME or NAME",
    "softmax(p=" + "-" * 5000 + "1)": "is not NAME or NAME",
    "x" * 5000: "'xxx.*' is not known",
}


@pytest.mark.parametrize("text", OPTIONS, ids=lambda text: text[:40])
def test_options_as_text(text):
    refused(lambda: resolve_mixer(text), OPTIONS[text])


def test_bare_words_are_text():
    assert resolve_mixer("lightning(slopes=paper, feature=identity)").spec == get("lightning").spec("paper", "identity")
    written, quoted = (ModelConfig(vocab_size=3).with_attention(f"based(map={x}), softmax") for x in ("full", "'full'"))
    assert written == quoted
    assert resolve_mixer("linear(normalise=False)").spec.normalise is False
    assert resolve_mixer("sink_token(tokens=2.0)").spec.tokens == 2
    assert isinstance(resolve_mixer("sink_token(tokens=2.0)").spec.tokens, int)


def test_every_option_of_the_readme_can_be_typed_as_it_is_printed():
    rows = [line.split(" | ") for line in README.read_text("utf-8").splitlines() if line.startswith("| `")]
    seen = 0
    for row in rows:
        name = row[0].strip("| `")
        if name not in names() or row[3] == "–":
            continue
        text = ", ".join(option.strip("`") for option in row[3].split(", "))
        assert resolve_mixer(f"{name}({text})").spec == get(name).spec()
        seen += 1
    assert seen > 10
