"""Converted models compute what transformers computes: step by step through a layer, padded and packed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.from_hf import convert
from jaxattn.nn import Decoder
from jaxattn.runs.load import load_params, read_config
from tests.convert.families import FAMILIES, build

torch = pytest.importorskip("torch", reason="the oracle")
LENGTH = 29


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request, tmp_path_factory):
    """torch model, our configuration and parameters."""
    folder = tmp_path_factory.mktemp(request.param)
    oracle = build(request.param, folder / "hf")
    dst = convert(str(folder / "hf"), folder / "ours")
    cfg = read_config(dst)
    params, _ = load_params(dst, cfg)
    return oracle, cfg.model, params


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 97, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids, positions, segments):
    return Decoder(model).apply({"params": params}, ids, positions, segments)


def answered(oracle, *arrays) -> np.ndarray:
    """Logits of transformers for ids, and a mask and positions where given."""
    ids, mask, positions = (*(torch.tensor(x, dtype=torch.long) for x in arrays), None, None)[:3]
    with torch.no_grad():
        oracle(ids[:1, :1])  # dynamic angles are those of the longest row since the last short one
        return oracle(ids, attention_mask=mask, position_ids=positions).logits.numpy()


def captured(oracle, ids):
    """What the parts of the torch model put out, by name."""
    found, hooks = {}, []
    first = lambda out: out[0] if isinstance(out, tuple) else out
    keep = lambda name: lambda module, args, out: found.__setitem__(name, first(out).detach().numpy())
    inner = oracle.model
    for name, module in {
        "embedding": inner.embed_tokens,
        "norm": inner.layers[0].input_layernorm,
        "attention": inner.layers[0].self_attn,
        "mlp": inner.layers[0].mlp,
        **{f"layer {i}": layer for i, layer in enumerate(inner.layers)},
        "final norm": inner.norm,
    }.items():
        hooks.append(module.register_forward_hook(keep(name)))
    with torch.no_grad():
        found["logits"] = oracle(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return found


def test_parity_climbs_from_the_embedding_to_the_logits(twin):
    oracle, model, params = twin
    ids = tokens(0, 2, LENGTH)
    theirs = captured(oracle, ids)

    @jax.jit
    def run(params, ids):
        return Decoder(model).apply({"params": params}, ids, mutable=["capture"], capture_intermediates=True)

    out, seen = run(params, jnp.asarray(ids))
    capture, inner = seen["capture"], seen["intermediates"]
    ours = {
        "embedding": np.asarray(params["embed"])[ids],
        "norm": inner["layer_0"]["attn_norm"]["__call__"][0],
        "attention": capture["layer_0"]["attn_out"][0],
        "mlp": capture["layer_0"]["mlp_out"][0],
        **{f"layer {i}": capture[f"layer_{i}"]["block_out"][0] for i in range(model.num_layers)},
        "final norm": inner["final_norm"]["__call__"][0],
        "logits": out,
    }
    for name, value in ours.items():
        scale = np.abs(theirs[name]).max()
        np.testing.assert_allclose(value, theirs[name], atol=2e-5 * max(1, scale), err_msg=name)


def test_padded_rows_equal_transformers(twin):
    """Each row as transformers answers it alone: in a batch its dynamic angles are those of the longest row."""
    oracle, model, params = twin
    ids, pad = tokens(1, 2, LENGTH), 5
    mask = np.ones_like(ids)
    mask[0, :pad] = 0  # left padding
    positions = np.maximum(mask.cumsum(1, dtype=np.int32) - 1, 0)
    ours = np.asarray(logits(model, params, ids, positions, mask))
    for row in range(2):
        theirs = answered(oracle, *(x[row : row + 1] for x in (ids, mask, positions)))[0]
        live = mask[row].astype(bool)
        np.testing.assert_allclose(ours[row][live], theirs[live], atol=2e-5 * max(1, np.abs(theirs).max()))


def test_packed_documents_equal_transformers_one_by_one(twin):
    oracle, model, params = twin
    lengths = [11, 3, 15]
    documents = [tokens(2 + i, 1, n) for i, n in enumerate(lengths)]
    ids = np.concatenate(documents, 1)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    both = (x.repeat(2, 0) for x in (ids, positions, segments))  # the shape of the padded rows: one program
    ours = np.asarray(logits(model, params, *both))[:1]
    at = 0
    for document in documents:
        theirs = answered(oracle, document)
        n = document.shape[1]
        np.testing.assert_allclose(ours[:, at : at + n], theirs, atol=2e-5 * max(1, np.abs(theirs).max()))
        at += n
