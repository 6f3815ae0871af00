"""`config.json` of a HuggingFace model as our `ModelConfig`, and back; parsed here because a wrong default is silent.

transformers 5 moved `rope_theta` into `rope_parameters`; both forms are read, and a model without a base is refused
(several loaders fall back to 10000 and answer nonsense).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar, cast

from jaxattn.errors import ConfigError, Corrupt, Mismatch, Unsupported, suggest
from jaxattn.models import ModelConfig
from jaxattn.rope import RopeScaling

Json = dict[str, Any]
T = TypeVar("T")

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SCALINGS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3"}
LARGEST = 1 << 31
UNSUPPORTED = {  # field -> why, if it is there and not empty
    "quantization_config": "quantised weights are not read; use the unquantised checkpoint or a GGUF file",
    "auto_map": "code from a checkpoint is never executed; use a checkpoint of a stock architecture",
}


def architecture(raw: Json, origin: str) -> str:
    """The class that a checkpoint says it is.

    Raises:
      Corrupt: it says none.
      Unsupported: it is none of `MODEL_TYPES`, is a mixture of experts, is quantised, or brings its own code.
    """
    names = raw.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise Corrupt(f"{origin}: architectures is {str(names)[:80]} but must hold one name, like LlamaForCausalLM.")
    if any("expert" in key for key in raw) or "Moe" in names[0] or names[0].startswith("Mixtral"):
        raise Unsupported(
            f"{origin}: {names[0][:80]} is a mixture of experts, which is not supported; use a dense model."
        )
    if names[0] not in MODEL_TYPES:
        raise Unsupported(f"{origin}: " + suggest("architecture", names[0][:80], list(MODEL_TYPES)))
    for field, why in UNSUPPORTED.items():
        if raw.get(field):
            raise Unsupported(f"{origin}: {field} is set, but {why}.")
    return names[0]


def parse(raw: Json, origin: str = "config.json") -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
      Corrupt: a field is missing or no value of its kind.
      Unsupported: something this project does not compute.
      Mismatch: two fields contradict each other.
    """
    name, get = architecture(raw, origin), _Reader(raw, origin)
    heads, width, layers = get.count("num_attention_heads"), get.count("hidden_size"), get.count("num_hidden_layers")
    kv_heads = get.count("num_key_value_heads", heads)
    if raw.get("head_dim") is None and width % heads:
        raise Mismatch(f"{origin}: hidden_size {width} is not divisible by num_attention_heads {heads}.")
    if heads % kv_heads:
        raise Mismatch(f"{origin}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}.")
    act = get.value("hidden_act", str, "silu")
    if act not in ("silu", "swish"):
        raise Unsupported(f"{origin}: hidden_act is {act[:40]!r} but only 'silu' is supported.")
    context = get.count("max_position_embeddings")
    base, scaling, fraction = _rope(get, context)
    bias = get.value("attention_bias", bool, False)
    if get.value("mlp_bias", bool, False) and not bias:
        raise Unsupported(f"{origin}: mlp_bias without attention_bias is not supported.")
    everywhere = bias and get.value("mlp_bias", bool, False)
    attention_bias = "qkv" if name == "Qwen2ForCausalLM" else "qkvo" if bias and not everywhere else "none"
    try:
        return ModelConfig(
            vocab_size=get.count("vocab_size"),
            num_layers=layers,
            d_model=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            key_dim=get.count("head_dim", width // heads),
            mixers=_mixers(get, name, layers),
            mlps=("swiglu",),
            d_ff=get.count("intermediate_size"),
            norm="rmsnorm",
            norm_eps=get.number("rms_norm_eps", 1e-6),
            qk_norm=name == "Qwen3ForCausalLM",
            position="rope",
            rope_base=base,
            rope_fraction=fraction,
            rope_scaling=scaling,
            max_positions=context,
            use_bias=everywhere,
            attention_bias=attention_bias,
            tie_embeddings=get.value("tie_word_embeddings", bool, False),
        )
    except ConfigError as error:
        raise Mismatch(f"{origin}: {error}") from error


def write(model: ModelConfig, dtype: str) -> Json:
    """The `config.json` of a model that has a HuggingFace architecture (`parse` gives it back).

    Raises:
      Unsupported: naming what no HuggingFace Llama, Mistral or Qwen has.
    """
    name = _architecture_of(model)
    scaling = model.rope_scaling
    rope: Json = {"rope_theta": model.rope_base, "rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if model.rope_fraction != 1:
        rope["partial_rotary_factor"] = model.rope_fraction
    if scaling.kind != "none":
        rope["factor"] = scaling.factor
    if scaling.kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope |= {"attention_factor": scaling.amplitude, "truncate": scaling.truncate}
    raw: Json = {
        "architectures": [name],
        "model_type": MODEL_TYPES[name],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ff_width("swiglu"),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions or 2048,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "rope_theta": model.rope_base,  # for readers of before transformers 5
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": dtype,
        "use_cache": True,
    }
    if scaling.kind != "none":
        raw["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if name in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        raw["attention_bias"] = model.use_bias or model.attention_bias == "qkvo"
    if name == "LlamaForCausalLM":
        raw["mlp_bias"] = model.use_bias
    windows = [model.mixer(i).window for i in range(model.num_layers)]
    if name == "MistralForCausalLM":
        raw["sliding_window"] = windows[0]
    elif name.startswith("Qwen"):
        sliding = [w for w in windows if w]
        raw |= {"use_sliding_window": bool(sliding), "sliding_window": sliding[0] if sliding else None}
        raw["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return raw


def _architecture_of(model: ModelConfig) -> str:
    """The class that computes what the model does."""
    plain = {
        "norm": (model.norm, "rmsnorm"),
        "norm_position": (model.norm_position, "pre"),
        "mlps": (set(model.mlps), {"swiglu"}),
        "position": (model.position, "rope"),
        "value_dim": (model.v_dim, model.head_dim),
        "scale_embeddings": (model.scale_embeddings, False),
        "scan_layers": (model.scan_layers, False),
    }
    for field, (found, wanted) in plain.items():
        if found != wanted:
            raise Unsupported(
                f"model.{field} is {found!r} but HuggingFace's Llama, Mistral and Qwen have {wanted!r}: "
                "this model cannot be exported."
            )
    for text in model.mixers:
        choice = model.mixer(model.mixers.index(text))
        softmax = choice.mechanism is not None and choice.mechanism.name == "softmax"
        if not softmax or choice.mechanism is None or choice.spec != choice.mechanism.spec():
            raise Unsupported(
                f"attention {text!r} has no HuggingFace architecture: only softmax, with or without a window, "
                "can be exported."
            )
    windows = {model.mixer(i).window for i in range(model.num_layers)}
    qwen = "Qwen3ForCausalLM" if model.qk_norm else "Qwen2ForCausalLM" if model.attention_bias == "qkv" else None
    if qwen:
        if model.use_bias or (model.qk_norm and model.attention_bias == "qkv"):
            raise Unsupported("qk_norm, qkv biases and biases everywhere have no common HuggingFace architecture.")
        if len(windows - {None}) > 1:
            raise Unsupported(f"windows {sorted(w for w in windows if w)}: a Qwen model has one window size.")
        return qwen
    if windows == {None}:
        return "LlamaForCausalLM"
    if len(windows) > 1 or model.use_bias or model.attention_bias != "none":
        raise Unsupported(
            "a window in some layers only, or with biases, needs a Qwen architecture (qkv bias or qk_norm)."
        )
    return "MistralForCausalLM"


def _mixers(get: _Reader, name: str, layers: int) -> tuple[str, ...]:
    """softmax, with the sliding window in the layers that have one."""
    window = get.raw.get("sliding_window")
    if name == "LlamaForCausalLM" or window is None:
        return ("softmax",)
    if name.startswith("Qwen") and not get.value("use_sliding_window", bool, False):
        return ("softmax",)
    local = f"softmax(window={get.count('sliding_window')})"
    if name == "MistralForCausalLM":
        return (local,)
    kinds = get.raw.get("layer_types")
    if kinds is None:
        first = get.count("max_window_layers", layers, least=0)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = {"sliding_attention": local, "full_attention": "softmax"}
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in known for k in kinds):
        raise Corrupt(
            f"{get.origin}: layer_types must name sliding_attention or full_attention for each of {layers} layers."
        )
    return tuple(known[k] for k in kinds)


def _rope(get: _Reader, context: int) -> tuple[float, RopeScaling, float]:
    """Base, scaling and the rotated share of the head dim."""
    raw, origin = get.raw, get.origin
    new, old = raw.get("rope_parameters"), raw.get("rope_scaling")
    for field, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise Corrupt(f"{origin}: {field} must be an object, not {str(value)[:60]}.")
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            raise Unsupported(f"{origin}: {field} differs between layers, which is not supported.")
    inner = _Reader({**(old or {}), **(new or {})}, f"{origin}: rope_parameters")
    bases = {r.number("rope_theta") for r in (get, inner) if r.raw.get("rope_theta") is not None}
    if not bases:
        raise Corrupt(
            f"{origin} gives no rotary base (neither rope_theta nor rope_parameters.rope_theta), and a guess would be "
            "silently wrong; add the value the model was trained with."
        )
    if len(bases) > 1:
        raise Mismatch(f"{origin}: rope_theta and rope_parameters.rope_theta differ: {sorted(bases)}; correct one.")
    kind = inner.value("rope_type", str, inner.value("type", str, "default"))
    if kind not in SCALINGS:
        raise Unsupported(f"{origin}: rope scaling {kind[:40]!r} is not supported; only {', '.join(SCALINGS)} are.")
    fraction = inner.number("partial_rotary_factor", get.number("partial_rotary_factor", 1.0))
    base = bases.pop()
    if SCALINGS[kind] == "none":
        return base, RopeScaling(), fraction
    factor = inner.number("factor")
    fields: Json = {"kind": SCALINGS[kind], "factor": factor}
    if kind == "dynamic":
        fields["original_length"] = context
    if kind in ("yarn", "llama3"):
        default = context if kind == "yarn" else None
        fields["original_length"] = inner.count("original_max_position_embeddings", default)
    if kind == "llama3":
        fields |= {name: inner.number(name) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        fields |= {"beta_fast": inner.number("beta_fast", 32.0), "beta_slow": inner.number("beta_slow", 1.0)}
        fields |= {"truncate": inner.value("truncate", bool, True), "attention_factor": _amplitude(inner, factor)}
    try:
        return base, RopeScaling(**fields), fraction
    except ConfigError as error:
        raise Corrupt(f"{origin}: {error}") from error


def _amplitude(inner: _Reader, factor: float) -> float:
    """YaRN's factor of cos and sin, with DeepSeek's two numbers where they are given."""
    given = inner.raw.get("attention_factor")
    if given is not None:
        return inner.number("attention_factor")
    grow = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    above, below = inner.raw.get("mscale"), inner.raw.get("mscale_all_dim")
    if above and below:
        return grow(inner.number("mscale")) / grow(inner.number("mscale_all_dim"))
    return grow(1.0)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Fields of a JSON object, each checked for its kind."""

    raw: Json
    origin: str

    def value(self, field: str, kind: type[T], default: T | None = None) -> T:
        found = self.raw.get(field)
        if found is None:
            if default is None:
                raise Corrupt(f"{self.origin}: {field} is missing; it is needed and not guessed.")
            return default
        if not isinstance(found, kind) or (kind is not bool and isinstance(found, bool)):
            raise Corrupt(f"{self.origin}: {field} is {str(found)[:60]!r} but must be a {kind.__name__}.")
        return found

    def count(self, field: str, default: int | None = None, least: int = 1) -> int:
        found = self.value(field, int, default)
        if not least <= found < LARGEST:
            raise Corrupt(f"{self.origin}: {field} is {str(found)[:40]} but must be from {least} to {LARGEST - 1}.")
        return found

    def number(self, field: str, default: float | None = None) -> float:
        found = self.value(field, cast(Any, (int, float)), default) if self.raw.get(field) is not None else default
        if found is None:
            raise Corrupt(f"{self.origin}: {field} is missing; it is needed and not guessed.")
        try:
            found = float(found)
        except OverflowError as error:
            raise Corrupt(f"{self.origin}: {field} is too large a number.") from error
        if not math.isfinite(found) or found <= 0:
            raise Corrupt(f"{self.origin}: {field} is {found} but must be a positive number.")
        return found
