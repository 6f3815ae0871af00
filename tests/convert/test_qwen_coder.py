"""Qwen2.5-Coder-0.5B-Instruct from a Q4_K_M file: 32k context, biases, four quantisations, an output of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.from_hf import convert
from jaxattn.nn import Decoder
from jaxattn.runs.load import load_params, read_config
from scripts.get import path_of

torch = pytest.importorskip("torch", reason="the oracle")
NAME = "qwen2.5-coder-0.5b"
PROMPTS = (
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "The capital of France is",
    "SELECT name, COUNT(*) FROM orders GROUP BY",
)


@pytest.mark.slow
def test_a_mixed_quantisation_of_half_a_billion_weights_converts_with_transformers_logits(tmp_path):
    import transformers

    path = path_of(NAME)
    if not path.exists():
        pytest.skip(f"needs 479 MB once: python -m scripts.get {NAME}")
    cfg = read_config(convert(str(path), tmp_path / "ours"))
    model = cfg.model
    assert (model.num_layers, model.attention_bias, model.tie_embeddings) == (24, "qkv", False)
    assert (model.max_positions, model.rope_base, model.num_kv_heads) == (32_768, 1e6, 2)
    call = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **call)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **call).eval()
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    with torch.no_grad():
        theirs = [oracle(torch.tensor([ids])).logits[0].numpy() for ids in rows]
    del oracle
    params, _ = load_params(tmp_path / "ours", cfg)
    longest = max(map(len, rows))
    run = jax.jit(lambda params, *x: Decoder(model).apply({"params": params}, *x))
    for ids, expected in zip(rows, theirs, strict=True):
        n, pad = len(ids), longest - len(ids)
        live = (np.arange(longest) < n).astype(np.int32)[None]
        tokens = np.asarray([ids + [0] * pad], np.int32)
        ours = np.asarray(run(params, jnp.asarray(tokens), None, jnp.asarray(live)))[0, :n]
        np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))
        assert np.abs(ours - expected).max() < 1e-3 * np.abs(expected).max()
