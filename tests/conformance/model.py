"""A mechanism inside its layer, inside a model: one batch and a few programs that answer every question.

Rows of the batch: a text, the same with a later token changed, two documents packed, the second document's text, and
a document with padding on both sides. Whoever lets rows, documents, padding or the future into an answer differs from
another row of the same call.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxattn.analysis import AttentionView, look
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder, stack_layers
from tests.conformance.cases import close, normal

LENGTH, VOCAB = 14, 17
CHANGED = 9  # the place of the token that row 1 has otherwise
CUT, SECOND, LEFT = 5, 6, 3  # tokens of the first and second document of row 2; padding in front of row 4
BASE = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_positions": 40,
}
TRACES: collections.Counter[tuple[ModelConfig, str]] = collections.Counter()


def config(**fields: Any) -> ModelConfig:
    return ModelConfig(**(BASE | fields))


@functools.cache
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions and segment ids [5, T]; see the module docstring."""
    rng = np.random.default_rng(1)
    text, other = rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
    changed = np.where(np.arange(LENGTH) == CHANGED, (text + 5) % VOCAB, text)
    rest, body = LENGTH - CUT - SECOND, LENGTH - LEFT - 2
    both = np.concatenate([text[:CUT], other[:SECOND], rng.integers(0, VOCAB, rest)])
    padded = np.concatenate([rng.integers(0, VOCAB, LEFT), text[:body], rng.integers(0, VOCAB, 2)])
    tokens = np.stack([text, changed, both, other, padded]).astype(np.int32)
    plain = np.arange(LENGTH)
    positions = np.stack(
        [
            plain,
            plain,
            np.concatenate([plain[:CUT], plain[:SECOND], 0 * plain[:rest]]),
            plain,
            np.concatenate([0 * plain[:LEFT], plain[:body], 0 * plain[:2]]),
        ]
    )
    segments = np.ones((5, LENGTH))
    segments[2, CUT:], segments[2, CUT + SECOND :] = 2, 0
    segments[4, :LEFT] = segments[4, LEFT + body :] = 0
    return tokens, positions.astype(np.int32), segments.astype(np.int32)


@functools.cache
def params_of(cfg: ModelConfig) -> Any:
    """Parameters made by NumPy, none of them zero or one: these would hide mistakes."""
    shapes = jax.eval_shape(Decoder(cfg).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    flat = flatten_dict(shapes)

    def fill(number: int, path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        x = normal(number, shape)
        if path[-1] == "embed" or len(shape) < 2:
            return 1 + 0.2 * x if "scale" in path[-1] or "norm" in path[-1] else 0.5 * x
        return x * shape[-2] ** -0.5 if shape[-2] > 1 else 0.5 * x

    return unflatten_dict({path: fill(i, path, x.shape) for i, (path, x) in enumerate(sorted(flat.items()))})


@functools.partial(jax.jit, static_argnums=0)
def _view(cfg: ModelConfig, params: Any, tokens, positions, segments, start) -> tuple[Any, list[dict[str, Any]]]:
    TRACES[cfg, "view"] += 1
    view = look(cfg, params, tokens, positions, segments)
    return view.logits, [
        {
            "rows": layer.weights(),
            "some": layer.weights(start, 3),
            "heads": layer.heads_out,
            "rebuilt": None if layer.shows else layer.rebuild(),
            "again": _again(layer) if layer.shows and layer.long is None else None,
            "projected": layer.projected(layer.heads_out),
            "out": view.components[layer.layer]["attn_out"],
        }
        for layer in view.attention
    ]


def _again(layer: AttentionView) -> Any:
    """The heads once more from all that was captured, rates too: for rows that are not the whole output."""
    o = layer.mechanism.reference(layer.queries, layer.keys, layer.values, layer.vis, layer.call)
    around = layer.mechanism.surround
    if around is None or around.finish is None:
        return o
    return around.finish(o, layer.inputs, spec=layer.call.spec, params=layer.surround)


@functools.cache
def viewed(cfg: ModelConfig) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Logits of the batch and what `look` sees of every attention layer."""
    return jax.device_get(_view(cfg, params_of(cfg), *batch(), 5))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(cfg: ModelConfig, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Compiled: op by op these tests would take several times as long."""
    TRACES[cfg, kwargs.get("method", "call")] += 1
    return Decoder(cfg).apply({"params": params}, *args, **kwargs)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def start(cfg: ModelConfig, params: Any, rows: int, capacity: int) -> Any:
    return Decoder(cfg).apply({"params": params}, rows, capacity, method="start")


# --- questions


def a_later_token_does_not_reach_the_past(cfg: ModelConfig) -> None:
    logits, _ = viewed(cfg)
    assert logits.shape == (5, LENGTH, VOCAB)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits[0, :CHANGED], logits[1, :CHANGED])
    assert not np.allclose(logits[0, CHANGED:], logits[1, CHANGED:])


def packed_documents_equal_separate_ones(cfg: ModelConfig) -> None:
    """Also with sink tokens in front: one copy serves every document of the row."""
    logits, _ = viewed(cfg)
    np.testing.assert_allclose(logits[2, :CUT], logits[0, :CUT], atol=2e-4)
    np.testing.assert_allclose(logits[2, CUT : CUT + SECOND], logits[3, :SECOND], atol=2e-4)


def padding_on_either_side_changes_nothing(cfg: ModelConfig) -> None:
    logits, _ = viewed(cfg)
    body = LENGTH - LEFT - 2
    np.testing.assert_allclose(logits[4, LEFT : LEFT + body], logits[0, :body], atol=2e-4)
    assert np.all(np.isfinite(logits))


def weights_rebuild_every_layer(cfg: ModelConfig) -> None:
    """The rows of the analysis are what the model computed: heads, W_O and all that the layer does around them."""
    _, layers = viewed(cfg)
    _, _, segments = batch()
    for layer in layers:
        close(layer["projected"], layer["out"])
        if layer["rebuilt"] is not None:
            close(layer["rebuilt"], layer["heads"])
        if layer["again"] is not None:
            close(layer["again"], layer["heads"], rtol=1e-4)
        rows, some = layer["rows"], layer["some"]
        assert np.any(rows.values[:, :, 5:8])
        np.testing.assert_allclose(some.values, rows.values[:, :, 5:8], atol=1e-5)
        assert some.slots == rows.slots
        front = rows.values.shape[2] - LENGTH
        real = rows.values[..., front:, rows.slots + front :]
        assert not np.any(np.triu(real[0, 0], 1)), "no weight on later tokens"
        assert not np.any(real[2, :, CUT:, :CUT]), "no weight on another document"
        assert not np.any(np.where((segments == 0)[:, None, None], real, 0)), "no weight on padding"


@functools.partial(jax.jit, static_argnums=0)
def _gradients(cfg: ModelConfig, params: Any, tokens, positions, segments) -> Any:
    TRACES[cfg, "gradients"] += 1

    def scalar(params: Any) -> Any:
        logits = Decoder(cfg).apply({"params": params}, tokens, positions, segments)
        return jnp.sum(jnp.sin(logits) * (segments != 0)[..., None])

    return jax.grad(scalar)(params)


def every_parameter_has_a_gradient(cfg: ModelConfig, idle: tuple[str, ...] = ()) -> None:
    """idle: parts of names of parameters that have none by design."""
    grads = _gradients(cfg, params_of(cfg), *batch())
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), name
        if not any(part in name for part in idle):
            assert np.any(leaf), f"{name} has no gradient"


PIECES = (6, 1, 1, 6)


def decoding_equals_the_forward_pass(cfg: ModelConfig) -> None:
    """Every row of the batch: packed and padded ones too."""
    tokens, positions, segments = batch()
    states, outputs, at = start(cfg, params_of(cfg), 5, LENGTH), [], 0
    for n in PIECES:
        cut = [x[:, at : at + n] for x in (tokens, positions, segments)]
        out, states = apply(cfg, params_of(cfg), states, *cut, method="step")
        outputs.append(np.asarray(out))
        at += n
    live = (segments != 0)[..., None]
    decoded = np.concatenate(outputs, 1)
    assert np.all(np.isfinite(decoded))
    np.testing.assert_allclose(np.where(live, decoded, 0), np.where(live, viewed(cfg)[0], 0), atol=2e-4)


def scanned_layers_are_the_unrolled_ones(cfg: ModelConfig) -> None:
    scanned = dataclasses.replace(cfg, scan_layers=True)
    logits = apply(scanned, stack_layers(params_of(cfg), scanned), *batch())
    live = (batch()[2] != 0)[..., None]
    np.testing.assert_allclose(np.where(live, logits, 0), np.where(live, viewed(cfg)[0], 0), atol=2e-4)


def other_values_compile_nothing(cfg: ModelConfig) -> None:
    """Of the view, and of a step that starts where another one ended."""
    tokens, positions, segments = batch()
    _view(cfg, params_of(cfg), tokens, positions, segments, 5)  # again: the program may have been let go of
    before = TRACES[cfg, "view"]
    _view(cfg, params_of(cfg), tokens[::-1], positions[::-1], segments[::-1], 2)
    assert TRACES[cfg, "view"] == before
    before = TRACES[cfg, "step"]
    decoding_equals_the_forward_pass(cfg)
    assert TRACES[cfg, "step"] - before <= len(set(PIECES))


QUESTIONS = (
    a_later_token_does_not_reach_the_past,
    packed_documents_equal_separate_ones,
    padding_on_either_side_changes_nothing,
    weights_rebuild_every_layer,
    decoding_equals_the_forward_pass,
    scanned_layers_are_the_unrolled_ones,
    other_values_compile_nothing,
)
