"""The conformance suite sees planted faults: a mechanism with each of them is registered, and its question fails.

A question that a broken mechanism passes asks nothing. Every fault here is one that a new mechanism could have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.masks import PADDING, visible
from jaxattn.mechanisms import Mechanism, RowWeights, get, register, unregister
from jaxattn.policies import dense
from jaxattn.stores import append
from pallas_kernels.flash.reference import dense_scores
from tests.conformance import model, questions
from tests.conformance.cases import Case, standard

SOFTMAX, K_BIAS, SIGMOID = get("softmax"), get("k_bias"), get("sigmoid")
LIGHTNING, TRANSNORMER = get("lightning"), get("transnormer")


@pytest.fixture
def plant():
    """Registers a mechanism with a fault under a name of its own, for one test."""
    added = []

    def put(base: Mechanism, **fault: Any) -> Mechanism:
        added.append(register(dataclasses.replace(base, name=f"planted_{base.name}", **fault)))
        return added[-1]

    yield put
    for mechanism in added:
        unregister(mechanism.name)


def fails(question: Callable[..., None], *args: Any) -> None:
    with pytest.raises(AssertionError):
        question(*args)


def changed(base: Mechanism, function: str, change: Callable[..., Any]) -> dict[str, Any]:
    """A function of the mechanism around which something goes wrong: change(function, *args)."""
    return {function: functools.partial(change, getattr(base, function))}


# --- faults of a mechanism


def weights_of_another(fn, *args):
    *tokens, call = args
    return SIGMOID.weights(*tokens, dataclasses.replace(call, spec=SIGMOID.spec()))


def weights_that_hide_their_slot(fn, *args):
    rows = fn(*args)
    return RowWeights(rows.values.at[..., 0].set(0.0), rows.scores, rows.slots)


def weights_before_the_mask(fn, q, k, vis, call):
    return fn(
        q,
        k,
        dataclasses.replace(vis, q_segments=jnp.ones_like(vis.q_segments), k_segments=jnp.ones_like(vis.k_segments)),
        call,
    )


def weights_that_forget_which_rows(fn, q, k, vis, call):
    """Right for all rows, wrong for a part: positions counted from the part's own start."""
    rows = jnp.arange(q.shape[1])[None].repeat(q.shape[0], 0)
    return fn(q, k, dataclasses.replace(vis, q_positions=rows), call)


def looks_one_ahead(fn, q, k, v, vis, call):
    return fn(q, k, v, dataclasses.replace(vis, q_positions=vis.q_positions + 1, aligned=None), call)


def forgets_documents(fn, q, k, v, vis, call):
    live = lambda x: (x != PADDING).astype(x.dtype)
    order = jnp.arange(q.shape[1])[None].repeat(q.shape[0], 0)
    vis = dataclasses.replace(vis, q_segments=live(vis.q_segments), k_segments=live(vis.k_segments))
    return fn(q, k, v, dataclasses.replace(vis, q_positions=order, k_positions=order), call)


def answers_padding(fn, q, k, v, vis, call):
    return fn(q, k, v, vis, call) + (vis.q_segments == PADDING)[:, :, None, None]


def counts_rows_instead_of_positions(fn, q, k, v, vis, call):
    return fn(q * (1 + 0.01 * jnp.arange(q.shape[1])[:, None, None]).astype(q.dtype), k, v, vis, call)


def mixes_heads(fn, q, k, v, vis, call):
    o = fn(q, k, v, vis, call)
    return o + 0.01 * jnp.mean(o, axis=2, keepdims=True).astype(o.dtype)


def mixes_rows(fn, q, k, v, vis, call):
    o = fn(q, k, v, vis, call)
    return o + 0.01 * (o[:1] * (vis.q_segments != PADDING)[:, :, None, None]).astype(o.dtype)


def reads_the_wrong_key_head(fn, q, k, v, vis, call):
    return fn(q, k[:, :, ::-1], v[:, :, ::-1], vis, call)


def drops_a_gradient(fn, q, k, v, vis, call):
    return fn(q, jax.lax.stop_gradient(k), v, vis, call)


def bare_softmax(fn, q, k, v, vis, call):
    """exp(s) / Σ exp(s) as it stands: overflows."""
    s = dense_scores(q, k, vis, scale=q.shape[-1] ** -0.5)
    w = jnp.where(visible(vis)[:, None], jnp.exp(s), 0.0)
    z = jnp.sum(w, axis=-1, keepdims=True)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("bhts,bshv->bthv", w / jnp.where(z == 0, 1, z), v.astype(jnp.float32)).astype(v.dtype)


def nan_where_nothing_is_seen(fn, q, k, v, vis, call):
    s = jnp.where(visible(vis)[:, None], dense_scores(q, k, vis, scale=q.shape[-1] ** -0.5), -jnp.inf)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(s, axis=-1), v)


def returns_float32(fn, q, k, v, vis, call):
    return fn(q, k, v, vis, call).astype(jnp.float32)


def keeps_values_in_eight_bits(fn, q, k, v, vis, call):
    return fn(q, k, v.astype(jnp.float8_e4m3fn).astype(v.dtype), vis, call)


def never_the_same(fn, q, k, v, vis, call):
    o = fn(q, k, v, vis, call)
    noise = jax.pure_callback(
        lambda: np.float32(np.random.default_rng().random()), jax.ShapeDtypeStruct((), np.float32)
    )
    return o + (1e-3 * noise).astype(o.dtype)


def forgets_the_newest_token(fn, state, q, k, v, positions, segments, call):
    o, new = fn(state, q, k, v, positions, segments, call)
    return o, (state if q.shape[1] == 1 else new)


def decodes_padding(fn, state, q, k, v, positions, segments, call):
    return fn(state, q, k, v, positions, jnp.ones_like(segments), call)


def overwrites_silently(fn, state, q, k, v, positions, segments, call):
    o, state = fn(state, q, k, v, positions, segments, call)
    return jnp.nan_to_num(o), state


CORE = {  # fault -> (mechanism, its function, the question that sees it)
    weights_of_another: (SOFTMAX, "weights", questions.weights_rebuild_the_forward_pass),
    weights_that_hide_their_slot: (get("kv_bias"), "weights", questions.weights_rebuild_the_forward_pass),
    weights_before_the_mask: (SOFTMAX, "weights", questions.weights_rebuild_the_forward_pass),
    weights_that_forget_which_rows: (SOFTMAX, "weights", questions.weights_rebuild_the_forward_pass),
    looks_one_ahead: (SOFTMAX, "forward", questions.the_future_does_not_reach_the_past),
    forgets_documents: (SIGMOID, "forward", questions.packed_documents_do_not_see_each_other),
    answers_padding: (SOFTMAX, "forward", questions.padding_changes_nothing_and_gives_zeros),
    counts_rows_instead_of_positions: (SOFTMAX, "forward", questions.padding_changes_nothing_and_gives_zeros),
    mixes_heads: (SOFTMAX, "forward", questions.heads_and_rows_do_not_mix),
    mixes_rows: (SOFTMAX, "forward", questions.heads_and_rows_do_not_mix),
    reads_the_wrong_key_head: (SOFTMAX, "forward", questions.heads_and_rows_do_not_mix),
    drops_a_gradient: (SOFTMAX, "forward", lambda case: questions.values_and_gradients(case, *standard())),
    bare_softmax: (
        SOFTMAX,
        "forward",
        lambda case: questions.extreme_logits_stay_finite_and_equal_reference(case, 1e4),
    ),
    nan_where_nothing_is_seen: (SOFTMAX, "forward", questions.fully_masked_rows_are_zero_with_finite_gradients),
    returns_float32: (SOFTMAX, "forward", questions.bf16_is_as_close_as_bf16_can_be),
    keeps_values_in_eight_bits: (SOFTMAX, "forward", questions.bf16_is_as_close_as_bf16_can_be),
    never_the_same: (SOFTMAX, "forward", questions.calls_repeat_bitwise_and_compile_once),
    forgets_the_newest_token: (LIGHTNING, "step", lambda case: questions.steps_equal_forward(case, [9, 1, 1, 9])),
    decodes_padding: (LIGHTNING, "step", questions.left_padded_prompts_decode_like_unpadded_ones),
    overwrites_silently: (get("landmark"), "step", questions.a_full_cache_is_poisoned_inside_jit),
}


@pytest.mark.parametrize("fault", CORE, ids=lambda fault: fault.__name__)
def test_a_faulty_mechanism_is_seen(fault, plant):
    base, function, question = CORE[fault]
    mechanism = plant(base, **changed(base, function, fault))
    fails(question, Case(get(mechanism.name), mechanism.spec()))


def test_a_cache_of_keys_that_overwrites_or_forgets_is_seen(plant, monkeypatch):
    """Of mechanisms that keep plain keys the dense policy takes the steps."""
    case = lambda: Case(get(plant(SOFTMAX).name), SOFTMAX.spec())
    with monkeypatch.context() as patch:
        patch.setattr(dense, "poisoned", lambda o, state: o)
        fails(questions.a_full_cache_is_poisoned_inside_jit, case())
    unregister(f"planted_{SOFTMAX.name}")
    monkeypatch.setattr(dense, "append", lambda state, k, *rest: append(state, k, *rest) if k.shape[1] > 1 else state)
    questions.TRACES.clear()
    jax.clear_caches()
    fails(lambda one: questions.steps_equal_forward(one, [9, 1, 1, 9]), case())


def test_a_claim_that_weights_show_something_else_is_checked(plant):
    """Both ways to get around the question: to claim it needlessly, and with weights of tokens without influence."""
    lazy = plant(SOFTMAX, shows=lambda spec: "something else")
    fails(questions.weights_rebuild_the_forward_pass, Case(lazy, lazy.spec()))
    idle = lambda fn, q, k, v, vis, call: fn(q, k, jnp.where(vis.k_positions[..., None, None] == 3, 0, v), vis, call)
    other = plant(
        K_BIAS,
        shows=lambda spec: "something else",
        **changed(K_BIAS, "forward", idle) | changed(K_BIAS, "reference", idle),
    )
    fails(questions.weights_rebuild_the_forward_pass, Case(other, other.spec()))


# --- faults of what lies around a mechanism: a head-wise gate in transnormer's place


def gate_params(key, spec, *, d_model, heads, kv_heads, key_dim, value_dim):
    return {"gate": jnp.ones((d_model, heads), jnp.float32)}


def gated(x, o, params):
    return o * jax.nn.sigmoid(jnp.einsum("bte,eh->bth", x.astype(jnp.float32), params["gate"]))[..., None].astype(
        o.dtype
    )


def sound(o, x, *, spec, params):
    return gated(x, o, params)


def reads_the_next_token(o, x, *, spec, params):
    return gated(jnp.roll(x, -1, axis=1), o, params)


def reads_the_token_before(o, x, *, spec, params):
    """Causal, but over the border of documents."""
    return gated(jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1], o, params)


def counts_places(o, x, *, spec, params):
    return gated(x, o, params) * (1 + 0.1 * jnp.arange(o.shape[1]))[:, None, None].astype(o.dtype)


def looks_at_the_whole_piece(o, x, *, spec, params):
    """What a running mean does that keeps no state: right while the piece is the whole text."""
    return gated(jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None], o, params)


def leaves_a_parameter_unused(o, x, *, spec, params):
    return o


AROUND = {
    reads_the_next_token: model.a_later_token_does_not_reach_the_past,
    reads_the_token_before: model.packed_documents_equal_separate_ones,
    counts_places: model.padding_on_either_side_changes_nothing,
    looks_at_the_whole_piece: model.decoding_equals_the_forward_pass,
    leaves_a_parameter_unused: model.every_parameter_has_a_gradient,
}


def layered(plant, base: Mechanism, **fault: Any):
    return model.config(mixers=(plant(base, **fault).name,))


def surrounded(finish) -> dict[str, Any]:
    around = dataclasses.replace(TRANSNORMER.surround, init_params=gate_params, finish=finish, variants=())
    return {"surround": around, "variants": ()}


@pytest.fixture(autouse=True)
def models_are_told_apart_by_name():
    """Programs are cached by a model's configuration, in which two faults have one name."""
    yield
    model.viewed.cache_clear()
    model.params_of.cache_clear()
    for program in (model._view, model.apply, model.start, model._gradients):
        program.clear_cache()
    model.TRACES.clear()


@pytest.mark.parametrize("finish", AROUND, ids=lambda finish: finish.__name__)
def test_a_faulty_surround_is_seen(finish, plant):
    fails(AROUND[finish], layered(plant, LIGHTNING, **surrounded(finish)))


def test_a_sound_one_passes(plant):
    """So that the faults above are what is seen."""
    cfg = layered(plant, LIGHTNING, **surrounded(sound))
    for question in set(AROUND.values()):
        question(cfg)


def forgets_its_depth(fn, *args):
    *tokens, call = args
    return fn(*tokens, dataclasses.replace(call, depth=(0, 1)))


def takes_the_layer_for_the_first(fn, *args):
    """As a mechanism does that cannot read the number of a layer that is scanned."""
    *tokens, call = args
    layer, count = call.depth
    return fn(*tokens, call if isinstance(layer, int) else dataclasses.replace(call, depth=(0, count)))


def test_weights_that_forget_the_depth_are_seen(plant):
    """In layer 1: no call of the bare mechanism has one."""
    fails(
        model.weights_rebuild_every_layer, layered(plant, LIGHTNING, **changed(LIGHTNING, "weights", forgets_its_depth))
    )


def test_a_layer_that_differs_when_it_is_scanned_is_seen(plant):
    fault = changed(LIGHTNING, "forward", takes_the_layer_for_the_first)
    fails(model.scanned_layers_are_the_unrolled_ones, layered(plant, LIGHTNING, **fault))


def test_every_question_of_this_suite_has_a_fault_that_it_sees():
    asked = {
        value
        for module in (questions, model)
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
        and list(getattr(value, "__annotations__", {}))[:1] in (["case"], ["cfg"])
        and value.__annotations__.get("return") == "None"
    }  # fmt: skip
    named = {fn.__name__ for fn in asked} - {"other_values_compile_nothing"}  # no mechanism can make a program retrace
    text = Path(__file__).read_text("utf-8")
    missing = {name for name in named if f".{name}" not in text}
    assert not missing
    assert len(named) > 12
