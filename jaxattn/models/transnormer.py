"""TransNormerLLM's decoder (arXiv 2307.14995): every mixer `transnormer`, gated units without activation.

Pre-norm SimpleRMSNorm without parameters (1e-6) everywhere, no biases, embeddings times sqrt(E), N(0, 0.02²)
initial weights, no position encoding besides decay and the first layer's LRPE.

Where the numbers are from: 385M is the default of the released configuration class; E, H and L of 7B and 15B
are the authors' own, of 1B a recollection. F = 2.75 E is the default's ratio, taken over to the other sizes.
Embeddings are tied, as that class leaves it. At the default vocabulary "385m" has 399M parameters; 385M are
those of the same body with a vocabulary of 50 thousand. "tiny" is ours, for tests and a laptop.

bf16, scanning and recomputation are the run's business: `dataclasses.replace(tnl("1b"), dtype="bfloat16")`.
Scanned over depth, all layers pay the double key width that only the first one needs (see the mechanism).
"""

from __future__ import annotations

from jaxattn.errors import ConfigError, suggest
from jaxattn.models.config import ModelConfig

SIZES = {  # layers, d_model, heads, d_ff, vocabulary
    "tiny": (2, 64, 4, 176, 256),
    "385m": (24, 1024, 8, 2816, 64_000),
    "1b": (16, 2048, 16, 5632, 64_000),
    "7b": (30, 4096, 32, 11_264, 64_000),
    "15b": (42, 5120, 40, 14_080, 100_000),
}


def tnl(size: str) -> ModelConfig:
    """The model of one size: "tiny", "385m", "1b", "7b" or "15b".

    Raises:
      ConfigError: no such size.
    """
    if size not in SIZES:
        raise ConfigError(suggest("size of TransNormerLLM", size, list(SIZES)))
    num_layers, d_model, num_heads, d_ff, vocab_size = SIZES[size]
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=d_ff,
        mixers=("transnormer",),
        mlps=("sglu",),
        norm="srmsnorm",
        norm_eps=1e-6,
        position="nope",
        scale_embeddings=True,
        tie_embeddings=True,
        init="normal",
    )
