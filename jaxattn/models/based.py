"""BASED's decoder (arXiv 2402.18668): gated short convolutions, Taylor linear attention, tiny windows.

Pre-norm RMSNorm, SwiGLU of width 2E, no biases besides the convolution layers', tied embeddings, RoPE in the
window layers only. Most layers are convolutions; linear attention sits at layers 1, 6, 11, ... and a sliding
window right behind each. The released window of 256 is halved by its code and shows 256 // 2 keys before the
query's own: 129 in our counting.

The sizes are the released reference configurations; "tiny" is ours, one of each kind and two convolutions.
Deviation: the residual stream has the model's dtype (the authors keep it in f32 under bf16).
"""

from __future__ import annotations

from jaxattn.errors import ConfigError, suggest
from jaxattn.models.config import ModelConfig

WINDOW = 256 // 2 + 1
SIZES = {  # layers, d_model, heads, vocabulary, linear layers, keys a window shows
    "tiny": (4, 64, 4, 256, (1,), 16),
    "360m": (27, 1024, 16, 50_257, (1, 6, 11, 16, 21), WINDOW),
    "1.3b": (36, 1792, 16, 50_257, (1, 6, 11, 16, 21, 27, 33), WINDOW),
}


def layer_map(num_layers: int, linear: tuple[int, ...], window: int) -> tuple[str, ...]:
    """The mixer of every layer: `based` at `linear`, a window layer behind each, convolutions elsewhere."""
    kinds = dict.fromkeys(linear, "based") | {layer + 1: f"softmax(window={window})" for layer in linear}
    return tuple(kinds.get(layer, "conv(width=3)") for layer in range(num_layers))


def based(size: str) -> ModelConfig:
    """The model of one size: "tiny", "360m" or "1.3b".

    Raises:
      ConfigError: no such size.
    """
    if size not in SIZES:
        raise ConfigError(suggest("size of BASED", size, list(SIZES)))
    num_layers, d_model, num_heads, vocab_size, linear, window = SIZES[size]
    return ModelConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        d_ff=2 * d_model,
        mixers=layer_map(num_layers, linear, window),
        mlps=("swiglu",),
        norm="rmsnorm",
        position="rope",
        tie_embeddings=True,
        init="normal",
    )
