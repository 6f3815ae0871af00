"""Landmarks that the model inserts: where they go, that nobody outside sees them, and reading in chunks."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals.measure import attention_maps, make_measure
from jaxattn.analysis import look
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, Edit, Stream, stack_layers, unstack_layers
from jaxattn.nn.insertion import insert as unjitted
from jaxattn.nn.insertion import insertion_block, landmark_labels
from jaxattn.reader import hidden_in_pieces, lay_out, piece_for, read
from tests.conformance import model

BASE = {
    "vocab_size": 17,
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_positions": 14,
    "mixers": ("landmark(block=3)",),
}


TOKENS = np.random.default_rng(1).integers(0, 17, (2, 64)).astype(np.int32)


def build(**fields):
    cfg = ModelConfig(**(BASE | fields))
    return cfg, jax.tree.map(jnp.asarray, model.params_of(cfg)), jnp.asarray(TOKENS[:, :14])


@partial(jax.jit, static_argnames=("cfg", "method"))
def apply(cfg, params, *args, method="__call__"):
    return Decoder(cfg).apply({"params": params}, *args, method=method)


@partial(jax.jit, static_argnames=("cfg", "capacity"))
def start(cfg, params, capacity):
    return Decoder(cfg).apply({"params": params}, 2, capacity, method="start")


insert = jax.jit(unjitted, static_argnums=2)


@jax.jit
def _lengthen(plan, x, landmark):
    return plan.lengthen(x, landmark)


def lengthen(plan, x, landmark):
    return np.asarray(_lengthen(plan, x, landmark))


def test_where_landmarks_go():
    """f = 2: a document of five tokens, one of two, padding at the end and (second row) in front."""
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 0], [0, 0, 0, 1, 2, 3, 0, 1]])
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0], [0, 0, 3, 3, 3, 3, 4, 4]])
    plan = insert(positions, segments, 2)
    np.testing.assert_array_equal(plan.places, [[0, 1, 3, 4, 6, 7, 8, 10], [0, 1, 2, 3, 5, 6, 8, 9]])
    np.testing.assert_array_equal(
        plan.source, [[0, 1, 8, 2, 3, 8, 4, 5, 6, 8, 7, 9], [0, 1, 2, 3, 8, 4, 5, 8, 6, 7, 8, 9]]
    )
    np.testing.assert_array_equal(
        plan.positions, [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 0], [0, 0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 0]]
    )
    np.testing.assert_array_equal(
        plan.segments, [[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3, 4, 4, 4, 0]]
    )
    np.testing.assert_array_equal(
        plan.ordinary, [[0, 1, 1, 2, 3, 3, 4, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 2, 3, 3, 0, 1, 1, 0]]
    )
    x = np.arange(1, 17, dtype=np.float32).reshape(2, 8, 1)
    long = lengthen(plan, x, np.float32([-1]))
    np.testing.assert_array_equal(long[0, :, 0], [1, 2, -1, 3, 4, -1, 5, 6, 7, -1, 8, 0])
    np.testing.assert_array_equal(jax.jit(lambda plan, x: plan.shorten(x))(plan, long), x)


@pytest.mark.parametrize("every", [1, 2, 3, 5, 50])
def test_every_l_th_position_is_a_landmark_wherever_a_document_begins(every):
    """Also in pieces that start inside a block, as decoding sees them."""
    for first in range(2 * every):
        plan = jax.device_get(insert(first + np.arange(9, dtype=np.int32)[None], np.ones((1, 9), np.int32), every))
        source, at = plan.source[0], plan.positions[0]
        used = source < 10
        assert bool(plan.fits[0])
        assert len(source) == 9 + -(-9 // every)
        assert set(source[used]) >= set(range(9))
        np.testing.assert_array_equal(source[used] == 9, at[used] % (every + 1) == every)
        np.testing.assert_array_equal(np.diff(at[used]), 1)


def test_landmarks_that_do_not_fit_are_never_dropped_in_silence():
    """Three documents a row, all starting at the end of a block, want more places than any usual row."""
    plan = insert(np.full((1, 3), 4, np.int32), np.int32([[1, 2, 3]]), 5)
    assert not np.any(plan.fits)
    assert np.all(np.isnan(lengthen(plan, np.ones((1, 3, 2), np.float32), np.ones(2, np.float32))))


def test_labels_of_files_with_landmarks():
    """The token in front of a landmark (9) is asked for the one behind it; 0 is end of text."""
    tokens = np.int32([[3, 4, 9, 5, 0, 9, 6, 7, 9]])
    labelled = jax.jit(landmark_labels, static_argnames=("landmark", "ignore"))
    labels, mask = labelled(tokens, landmark=9, ignore=(0,))
    np.testing.assert_array_equal(mask, [[1, 1, 0, 1, 0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(np.where(mask, labels, -1), [[4, 5, -1, 0, -1, -1, 7, -1, -1]])
    labels, mask = labelled(tokens[:, :7], landmark=9)
    np.testing.assert_array_equal(np.where(mask, labels, -1), [[4, 5, -1, 0, 6, -1, -1]])


VARIANTS = {  # what does not meet shares a model
    "rope": {},
    "f1-learned": {"mixers": ("landmark(block=1)",), "position": "learned"},
    "sinusoid-post": {"position": "sinusoid", "scale_embeddings": True, "norm_position": "post"},
    "mixed": {"mixers": ("landmark(block=3)", "softmax", "lightning", "conv"), "num_layers": 4},
    "scanned-nope": {
        "scan_layers": True, "num_layers": 4, "mixers": ("landmark(block=3)", "sigmoid"), "position": "nope",
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(
    "question",
    [
        model.a_later_token_does_not_reach_the_past,
        model.packed_documents_equal_separate_ones,
        model.padding_on_either_side_changes_nothing,
        model.weights_rebuild_every_layer,
        model.decoding_equals_the_forward_pass,
    ],
    ids=lambda question: question.__name__,
)
def test_models_with_landmarks_are_asked_what_all_are(question, fields):
    question(ModelConfig(**(BASE | fields)))


def test_capacity_is_counted_in_tokens():
    cfg, params, _ = build()
    assert start(cfg, params, 14)[0].slots == 14 + 4
    at = np.arange(14, dtype=np.int32)[None].repeat(2, 0)
    _, states = apply(cfg, params, start(cfg, params, 13), TOKENS[:, :13], at[:, :13], method="step")
    last = jnp.asarray(TOKENS[:, 13:14]), jnp.asarray(at[:, 13:])
    with pytest.raises(ConfigError, match="raise the capacity"):
        Decoder(cfg).apply({"params": params}, states, *last, method="step")


def test_the_model_is_the_one_with_landmarks_written_out_by_hand():
    cfg, params, tokens = build()
    embedded = np.asarray(params["embed"])[np.asarray(tokens)]
    rows = [np.concatenate([e, params["landmark"]]) if t % 3 == 2 else e[:]
            for t in range(14) for e in [embedded[0, t : t + 1]]]  # fmt: skip
    x = np.concatenate(rows)[None]
    assert x.shape[1] == 18

    def by_hand(decoder, x):
        at = jnp.arange(18, dtype=jnp.int32)[None]
        hidden, _ = decoder._blocks(x, Stream(at, jnp.ones_like(at)), None, ())
        return decoder.logits(decoder._finish(hidden))

    logits = np.asarray(jax.jit(lambda x: Decoder(cfg).apply({"params": params}, x, method=by_hand))(x))
    ordinary = np.arange(18) % 4 != 3
    np.testing.assert_allclose(np.asarray(apply(cfg, params, tokens))[0], logits[0, ordinary], atol=1e-5)


def test_the_landmark_is_learned_and_scan_and_remat_change_nothing():
    cfg, params, tokens = build(num_layers=4, scan_layers=True, remat=True, mixers=("landmark(block=3)", "softmax"))
    flat_cfg, flat = dataclasses.replace(cfg, scan_layers=False, remat=False), unstack_layers(params, cfg)
    loss = lambda c: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(Decoder(c).apply({"params": p}, tokens)))))
    (value, grad), (flat_value, flat_grad) = loss(cfg)(params), loss(flat_cfg)(flat)
    np.testing.assert_allclose(value, flat_value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grad, stack_layers(flat_grad, cfg))
    assert np.linalg.norm(grad["landmark"]) > 1e-3


def test_a_model_without_the_mechanism_has_no_landmark():
    assert "landmark" not in build(mixers=("softmax",))[1]
    assert insertion_block(("softmax", "none", "conv")) == 0
    assert insertion_block(("softmax", "landmark(block=7)", "landmark(block=7, retrieve=2)")) == 7


def test_what_a_model_that_inserts_refuses():
    with pytest.raises(ConfigError, match=r"insert landmarks after 7 and 3 tokens.* give all of them block=3"):
        build(mixers=("landmark(block=7)", "landmark(block=3)"))
    with pytest.raises(ConfigError, match="position 'alibi' cannot be used"):
        build(position="alibi")
    with pytest.raises(ConfigError, match="cannot see sink tokens"):
        build(mixers=("landmark(block=3)", "sink_token"))
    cfg, params, tokens = build()
    run = lambda edit: jax.jit(lambda: Decoder(cfg).apply({"params": params}, tokens, edits=(edit,)))()
    with pytest.raises(ConfigError, match=r"leave edit.value None"):
        run(Edit(0, "attn", value=jnp.zeros((2, 14, 16))))
    assert not np.allclose(run(Edit(0, "attn")), apply(cfg, params, tokens))


@pytest.mark.parametrize("mixers", [("landmark(block=3)",), ("landmark(block=3)", "k_bias")], ids=["alone", "mixed"])
def test_views_show_tokens_only(mixers):
    """Rows times values are the heads' outputs, which could not be if a row or column were a landmark's."""
    cfg, params, tokens = build(mixers=mixers)

    def seen(params, tokens):
        view = look(cfg, params, tokens)
        first, second = view.attention
        parts = view.logits, view.residuals, view.components, first.queries, first.values, first.heads_out
        return parts, first.value_norms(), first.weights(), first.weights(5, 4), second.weights()

    parts, norms, rows, some, others = jax.device_get(jax.jit(seen)(params, tokens))
    logits, residuals, components, queries, values, heads_out = parts
    np.testing.assert_allclose(logits, apply(cfg, params, tokens), atol=1e-5)
    assert residuals.shape == (2, 2, 14, 16)
    assert all(x.shape == (2, 14, 16) for part in components for x in part.values())
    assert queries.shape == heads_out.shape == (2, 14, 4, 4)
    assert norms.shape == (2, 4, 14)
    assert rows.values.shape == rows.scores.shape == (2, 4, 14, 14)
    np.testing.assert_allclose(rows.values.sum(-1), 1.0, atol=1e-5)
    wide = values.repeat(2, axis=2)
    np.testing.assert_allclose(np.einsum("bhts,bshv->bthv", rows.values, wide), heads_out, atol=1e-5)
    np.testing.assert_allclose(some.values, rows.values[:, :, 5:9], atol=1e-6)
    if len(mixers) > 1:  # a constant key in front, and landmarks that count as keys
        assert others.values.shape == (2, 4, 14, 1 + 14)
        total = others.values.sum(-1)
        np.testing.assert_allclose(total[:, :, :3], 1.0, atol=1e-5)
        assert np.all(total[:, :, 3:] < 1.0)


def test_the_sink_study_reads_such_a_model():
    cfg, params, tokens = build(position="learned", scan_layers=True)
    found = make_measure(cfg)(params, np.asarray(tokens))
    assert found["alpha"].shape == (2, 2, 4, 14)
    assert all(np.all(np.isfinite(x)) for x in found.values())
    # The first query has one key, so its column's mean weight is at least 1 / 14.
    assert np.all(found["alpha"][..., 0] >= 1 / 14)
    maps, extra = attention_maps(cfg, params, np.asarray(tokens))
    assert (maps.shape, extra) == ((2, 2, 4, 14, 14), 0)
    np.testing.assert_allclose(maps.astype(np.float32).sum(-1), 1.0, atol=5e-3)


# --- reading in pieces


def retrieving(cfg, text):
    return dataclasses.replace(cfg, mixers=(text,))


@partial(jax.jit, static_argnames="cfg")
def unembedded(cfg, params, hidden):
    return Decoder(cfg).apply({"params": params}, hidden, method="logits")


def logits_in_pieces(cfg, params, tokens, piece=0):
    return np.asarray(unembedded(cfg, params, hidden_in_pieces(cfg, {"params": params}, tokens, piece=piece)))


@pytest.mark.parametrize(
    ("select", "scan"),
    [("per_token_and_head", False), ("max_over_heads", True), ("max_over_tokens", False)],
    ids=["per_token_and_head", "max_over_heads-scanned", "max_over_tokens"],
)
def test_pieces_with_all_blocks_fetched_equal_one_shot(select, scan):
    """Card 3 through the whole model, pieces and single tokens: trained parameters, another `retrieve`."""
    cfg, params, _ = build(scan_layers=scan)
    tokens = TOKENS[:, :40]
    one_shot = np.asarray(apply(cfg, params, tokens))
    cfg = retrieving(cfg, f"landmark(block=3, retrieve=13, select='{select}')")
    np.testing.assert_allclose(logits_in_pieces(cfg, params, tokens, 9), one_shot, atol=1e-5)
    layout = lay_out(tokens[:, :36], np.array([36, 36]), 9)
    *_, (_, states) = read(cfg, {"params": params}, layout, room=40, piece=9)
    for t in range(36, 40):
        out, states = apply(cfg, params, states, tokens[:, t : t + 1], np.full((2, 1), t), method="step")
        np.testing.assert_allclose(np.asarray(out)[:, 0], one_shot[:, t], atol=1e-5)


def test_the_gate_matters():
    cfg, params, _ = build()
    tokens = TOKENS[:, :40]
    gated, bare = (
        logits_in_pieces(retrieving(cfg, f"landmark(block=3, retrieve=12, gate={gate})"), params, tokens, 9)
        for gate in (True, False)
    )
    assert np.max(np.abs(gated - bare)) > 1e-2


def test_a_text_longer_than_the_context_reads_at_constant_cost():
    """The state of 20 blocks is the same for any length, and so is every step."""
    cfg, params, _ = build()
    cfg = retrieving(cfg, "landmark(block=3, retrieve=2, context=30, cache_blocks=20)")
    assert start(cfg, params, 300)[0].keys.shape == (2, 21 * 4, 2, 4)
    tokens = np.random.default_rng(3).integers(0, 17, (2, 300)).astype(np.int32)
    logits = logits_in_pieces(cfg, params, tokens)
    assert np.all(np.isfinite(logits))
    np.testing.assert_allclose(logits_in_pieces(cfg, params, tokens[:, :200]), logits[:, :200], atol=1e-5)


def test_rows_of_any_length_are_read_as_if_alone():
    """Pieces begin at a row's own first token, else a block that is not finished leads beyond the trained positions."""
    cfg, params, _ = build()
    cfg = retrieving(cfg, "landmark(block=3, retrieve=2, context=30)")
    tokens = TOKENS
    lengths = np.array([64, 35])
    together = hidden_in_pieces(cfg, {"params": params}, tokens, lengths)
    for row, n in enumerate(lengths):
        alone = hidden_in_pieces(cfg, {"params": params}, tokens[row : row + 1, :n])
        assert np.all(np.isfinite(alone))
        np.testing.assert_allclose(together[row, :n], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (24, "cannot read 24 tokens at once: use at most 21"),
        (20, "which cut blocks: use 18"),
        (2, "use 3"),
        (-1, "of -1"),
    ],
)
def test_pieces_that_retrieval_does_not_allow(piece, message):
    """context 30: 40 positions, of which 3 blocks of 4 are for retrieval: 28 positions, 21 tokens."""
    cfg, params, tokens = build()
    with pytest.raises(ConfigError, match=message):
        hidden_in_pieces(
            retrieving(cfg, "landmark(block=3, retrieve=2, context=30)"),
            {"params": params},
            np.asarray(tokens),
            piece=piece,
        )


def test_pieces_are_chosen_within_what_every_layer_allows():
    cfg = build()[0]
    assert [piece_for(cfg, n) for n in (1, 5, 300, 9000)] == [1, 8, 512, 512]
    some = dataclasses.replace(cfg, mixers=("landmark(block=3)", "landmark(block=3, retrieve=2, context=30)"))
    assert [piece_for(some, n) for n in (1, 5, 16, 17, 300)] == [1, 8, 16, 21, 21]
    assert [piece_for(some, 300, most) for most in (1, 128)] == [21, 21]


def test_other_mechanisms_read_in_pieces_too():
    cfg, params, tokens = build(mixers=("softmax", "lightning"))
    tokens = np.asarray(tokens)
    np.testing.assert_allclose(logits_in_pieces(cfg, params, tokens, 4), apply(cfg, params, tokens), atol=2e-4)


def test_rows_are_laid_out_as_the_module_says():
    tokens = np.arange(1, 13, dtype=np.int32).reshape(2, 6)
    layout = lay_out(tokens, np.array([6, 3]), 4)
    np.testing.assert_array_equal(layout.tokens, [[1, 2, 3, 4, 0, 0, 5, 6], [0, 0, 0, 0, 0, 7, 8, 9]])
    np.testing.assert_array_equal(layout.positions, [[0, 1, 2, 3, 3, 3, 4, 5], [0, 0, 0, 0, 0, 0, 1, 2]])
    np.testing.assert_array_equal(layout.live, layout.tokens > 0)
    np.testing.assert_array_equal(layout.places[0], [0, 1, 2, 3, 6, 7])
    np.testing.assert_array_equal(layout.places[1, :3], [5, 6, 7])
