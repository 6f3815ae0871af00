"""What transformers 5.24 knows of each class: its defaults, and the keys that change a model in ways not computed here.

Any other key of a `config.json` is stored by transformers and read by nothing, so it is passed over here too:
tests/convert/test_matrix.py records which keys transformers asks for, and tries each at another value than its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxattn.errors import Corrupt, Mismatch, Unsupported, shown, suggest


@dataclasses.dataclass(frozen=True)
class Family:
    """A configuration class: its name in `model_type`, its model class, and the defaults of its fields."""

    kind: str
    architecture: str
    intermediate_size: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    """None: as many as query heads."""
    null_kv_heads: bool = True
    """Whether null means as many as query heads, or nothing."""
    vocab_size: int = 151_936
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    null_head_dim: bool = True
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    sliding_window: int | None = 4096
    max_window_layers: int = 28

    @property
    def is_qwen(self) -> bool:
        return self.kind.startswith("qwen")


_MISTRAL: dict[str, Any] = {
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "vocab_size": 32_000,
    "num_key_value_heads": 8,
    "null_kv_heads": False,
}
FAMILIES = (
    Family("llama", "LlamaForCausalLM", 11_008, 2048, vocab_size=32_000, sliding_window=None),
    Family("mistral", "MistralForCausalLM", **_MISTRAL),
    # A Mistral whose layers differ in their windows: what `model_type` mistral with `layer_types` is read as, too.
    Family("ministral", "MinistralForCausalLM", **_MISTRAL),
    Family("qwen2", "Qwen2ForCausalLM", 22_016, 32_768, num_key_value_heads=32, null_head_dim=False),
    Family("qwen3", "Qwen3ForCausalLM", 22_016, 32_768, num_key_value_heads=32, head_dim=128, null_head_dim=False),
)
BY_KIND = {family.kind: family for family in FAMILIES}
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}

_NESTED = "the model is a part of another one, which is not supported; use a checkpoint of the language model alone"
# Key -> (whether a value changes nothing, why the others are refused).
REFUSED: dict[str, tuple[Any, str]] = {
    "quantization_config": (
        lambda x: not x,
        "quantised weights are not read; use the unquantised checkpoint or a GGUF file",
    ),
    "auto_map": (lambda x: not x, "code from a checkpoint is never executed; use a checkpoint of a stock architecture"),
    "is_causal": (lambda x: x is True, "only causal models are supported"),
    "is_encoder_decoder": (lambda x: not x, "only decoders are supported"),
    "per_layer_config": (lambda x: not x, "layers that differ in their configuration are not supported"),
    "attribute_map": (lambda x: not x, "it renames the other fields; write them under their own names"),
    "kv_sharing_modes": (lambda x: x is None, "layers that share keys and values are not supported"),
    "attention_chunk_size": (lambda x: x is None, "attention in chunks is not supported"),
    "fusion_config": (lambda x: not x, "fused layers are not supported"),
    "transformers_weights": (lambda x: x is None, "weights are read from model.safetensors or its index alone"),
    "configuration_files": (lambda x: False, "the configuration would stand in another file; rename it config.json"),
    "_rope_type_labels": (lambda x: not x, "rotary angles that differ between layers are not supported"),
    "text_config": (lambda x: x is None, _NESTED),
    "text_encoder": (lambda x: x is None, _NESTED),
    "decoder": (lambda x: x is None, _NESTED),
    "generator": (lambda x: x is None, _NESTED),
}


def family_of(raw: Mapping[str, Any], origin: str) -> Family:
    """The class that transformers would open this with: `model_type` decides, and `architectures` must agree.

    Raises:
      Corrupt: neither is there, or they are no names.
      Mismatch: they contradict each other.
      Unsupported: another class, a mixture of experts, or a key of `REFUSED`.
    """
    names, kind = raw.get("architectures"), raw.get("model_type")
    if names is not None and not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise Corrupt(f"{origin}: architectures is {shown(names)} but must hold one name, like LlamaForCausalLM.")
    if kind is not None and not isinstance(kind, str):
        raise Corrupt(f"{origin}: model_type is {shown(kind)} but must be a name, like llama.")
    name = names[0] if names else None
    if name is None and kind is None:
        raise Corrupt(f"{origin}: architectures and model_type are missing; one must name the class, like llama.")
    _refuse_experts(raw, name or "", origin)
    if name is not None and name not in BY_ARCHITECTURE:
        raise Unsupported(f"{origin}: " + suggest("architectures", name[:80], list(BY_ARCHITECTURE)))
    if kind is not None and kind not in BY_KIND:
        raise Unsupported(f"{origin}: " + suggest("model_type", kind[:80], list(BY_KIND)))
    family = BY_KIND[kind] if kind else BY_ARCHITECTURE[str(name)]
    if name not in (None, family.architecture):
        raise Mismatch(
            f"{origin}: model_type is {kind} but architectures is {name}, another class; correct one of them."
        )
    for field, (harmless, why) in REFUSED.items():
        if field in raw and not harmless(raw[field]):
            raise Unsupported(f"{origin}: {field} is {shown(raw[field])}, but {why}.")
    return BY_KIND["ministral"] if family.kind == "mistral" and "layer_types" in raw else family


def _refuse_experts(raw: Mapping[str, Any], name: str, origin: str) -> None:
    counts = [key for key, value in raw.items() if key.endswith("experts") and value]
    if counts or "Moe" in name or name.startswith("Mixtral"):
        what = f"{counts[0][:60]} is {shown(raw[counts[0]])}" if counts else name[:80]
        raise Unsupported(f"{origin}: {what}: a mixture of experts is not supported; use a dense model.")
