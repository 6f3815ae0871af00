"""SmolLM2-135M on the device: prompts read and tokens written a second, with its own weights or with random ones."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.errors import UserError
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.nn.decoding import decoding_variables
from pallas_kernels import recording
from scripts.bench.device.tasks import Absent, short
from scripts.bench.infer_contenders import timed

SMOLLM2 = ModelConfig(
    vocab_size=49152, num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, d_ff=1536, rope_base=1e5,
    max_positions=8192, tie_embeddings=True, dtype="bfloat16",
)  # fmt: skip
TINY = ModelConfig(
    vocab_size=300, num_layers=2, d_model=64, num_heads=2, num_kv_heads=1, d_ff=128, max_positions=8192,
    tie_embeddings=True, dtype="bfloat16",
)  # fmt: skip
_open: dict[str, Any] = {}


def set_up(gguf: str, tiny: bool, seed: int) -> dict[str, Any]:
    """Opens the model; without a file, or where it cannot be read, of random weights, which take the same time."""
    why = "no --gguf was given"
    if gguf and not tiny:
        try:
            _open["model"], _open["variables"] = _from_gguf(Path(gguf))
            return {"weights": Path(gguf).name}
        except (ImportError, OSError, ValueError, UserError) as error:
            why = f"{type(error).__name__}: {short(error)}"
    model = TINY if tiny else SMOLLM2
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(lambda key: Decoder(model).init(key, tokens)["params"])(jax.random.key(seed))
    _open["model"], _open["variables"] = model, decoding_variables(model, params)
    return {"weights": f"random, as {why}"}


def _from_gguf(path: Path) -> tuple[ModelConfig, Any]:
    import dataclasses

    from convert import hf_config
    from convert.from_hf import read_params
    from convert.sources import open_source

    source = open_source(str(path))
    model = dataclasses.replace(hf_config.parse(source.config(), str(path)), dtype="bfloat16")
    return model, decoding_variables(model, read_params(source, model, dtype="bfloat16")[0])


def speed(batch: int, prompt: int, new: int, rounds: int, seed: int) -> dict[str, Any]:
    """Tokens a second of all rows together: medians, least and most of some rounds behind one that compiles."""
    if not _open:
        raise Absent("the model could not be opened")
    model = _open["model"]
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, (rounds + 1, batch, prompt)).astype(np.int32)
    begun = time.monotonic()
    with recording() as choices:
        timed(model, _open["variables"], tokens[0], new, prompt + new)
    compiled = time.monotonic() - begun
    seconds = [timed(model, _open["variables"], row, new, prompt + new)[:2] for row in tokens[1:]]
    rates = {
        "prefill": [batch * prompt / read for read, _ in seconds],
        "decode": [batch * new / wrote for _, wrote in seconds],
    }
    spread = lambda x: {"median": statistics.median(x), "least": min(x), "most": max(x)}
    return {
        "tokens_per_s": {part: spread(x) for part, x in rates.items()},
        "first_s": round(compiled, 1),
        "backends": choices,
    }
