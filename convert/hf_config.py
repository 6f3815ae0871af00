"""`config.json` of a HuggingFace model as our `ModelConfig`, and back; parsed here because a wrong default is silent.

Read as transformers 5.24 reads it: keys, precedence and the defaults of each class (`hf_families`, `hf_rope`). What it
reads and this project does not compute is refused by name.
"""

from __future__ import annotations

from typing import Any

from convert import hf_rope
from convert.hf_families import BY_ARCHITECTURE, Family, family_of
from convert.hf_fields import Fields, check_ids
from jaxattn.errors import ConfigError, Mismatch, Unsupported, shown
from jaxattn.models import ModelConfig

Json = dict[str, Any]

ACTIVATIONS = ("silu", "swish")
WIDEST_HEAD = 1 << 16
SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_TYPES = {SLIDING: SLIDING, FULL: FULL, "attention": FULL}  # the last is an old name
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def parse(raw: Json, origin: str = "config.json") -> ModelConfig:
    """The model that a `config.json` describes.

    Raises:
      Corrupt: a field is missing or no value of its kind.
      Unsupported: something this project does not compute.
      Mismatch: two fields contradict each other.
    """
    family, get = family_of(raw, origin), Fields(raw, origin)
    heads = get.count("num_attention_heads", family.num_attention_heads)
    width, layers = get.count("hidden_size", family.hidden_size), count_layers(raw, origin)
    kv_heads = get.count(
        "num_key_value_heads", family.num_key_value_heads or heads, **_null(family.null_kv_heads, heads)
    )
    if heads % kv_heads:
        raise Mismatch(f"{origin}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}.")
    head_dim = get.count(
        "head_dim", family.head_dim or width // heads or 1, **_null(family.null_head_dim, width // heads)
    )
    if not get.has("head_dim") and not family.head_dim and width % heads:
        raise Mismatch(f"{origin}: hidden_size {width} is not divisible by num_attention_heads {heads}.")
    if head_dim > WIDEST_HEAD:
        raise Unsupported(f"{origin}: heads of {head_dim:,} dims are not supported; {WIDEST_HEAD:,} are the most.")
    act = get.value("hidden_act", str, "silu")
    if act not in ACTIVATIONS:
        raise Unsupported(f"{origin}: hidden_act is {shown(act)} but only 'silu' is supported.")
    context = get.count("max_position_embeddings", family.max_position_embeddings)
    base, scaling = hf_rope.read(get, head_dim, context)
    biased = get.value("attention_bias", bool, False) if family.kind in ("llama", "qwen3") else False
    check_ids(get, TOKEN_IDS, several=("eos_token_id",))
    try:
        return ModelConfig(
            vocab_size=get.count("vocab_size", family.vocab_size),
            num_layers=layers,
            d_model=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            key_dim=head_dim,
            mixers=_mixers(get, family, layers),
            mlps=("swiglu",),
            d_ff=get.count("intermediate_size", family.intermediate_size),
            norm="rmsnorm",
            norm_eps=get.number("rms_norm_eps", 1e-6),
            qk_norm=family.kind == "qwen3",
            position="rope",
            rope_base=base,
            rope_scaling=scaling,
            max_positions=context,
            attention_bias="qkv" if family.kind == "qwen2" else "qkvo" if biased else "none",
            mlp_bias=get.value("mlp_bias", bool, False) if family.kind == "llama" else False,
            tie_embeddings=get.value("tie_word_embeddings", bool, False),
        )
    except ConfigError as error:
        raise Mismatch(f"{origin}: {error}") from error


def count_layers(raw: Json, origin: str) -> int:
    """The layers that a `config.json` says it has; they cost time, so a file is asked for them first."""
    return Fields(raw, origin).count("num_hidden_layers", family_of(raw, origin).num_hidden_layers)


def notes(raw: Json) -> list[str]:
    """What in it is out of force although it looks as if it mattered, one sentence each."""
    found = hf_rope.note(Fields(raw, "config.json"))
    return [] if found is None else [found]


def _null(allowed: bool, value: int) -> Json:
    return {"null": value} if allowed else {}


def write(model: ModelConfig, dtype: str, *, context: int = 2048, ids: Json | None = None) -> Json:
    """The `config.json` of a model that has a HuggingFace architecture (`parse` gives it back).

    Args:
      context: tokens of the longest training sequence, for a model that does not say.
      ids: `TOKEN_IDS`; what is missing is null, because transformers' classes have defaults of their own.

    Raises:
      Unsupported: naming what no HuggingFace Llama, Mistral or Qwen has.
    """
    family = _family_of_model(model)
    rope = hf_rope.write(model.rope_base, model.rope_scaling)
    raw: Json = {
        "architectures": [family.architecture],
        "model_type": family.kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ff_width("swiglu"),
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _context(model, context),
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "rope_theta": model.rope_base,  # for readers of before transformers 5
        "tie_word_embeddings": model.tie_embeddings,
        "dtype": dtype,
        "use_cache": True,
        **dict.fromkeys(TOKEN_IDS),
        **(ids or {}),
    }
    if model.rope_scaling.kind != "none":
        raw["rope_scaling"] = rope
    if family.kind in ("llama", "qwen3"):
        raw["attention_bias"] = model.attention_bias == "qkvo" or model.use_bias
    if family.kind == "llama":
        raw["mlp_bias"] = model.mlp_bias or model.use_bias
    windows = [model.mixer(i).window for i in range(model.num_layers)]
    sliding = [window for window in windows if window]
    if family.kind != "llama":
        raw["sliding_window"] = sliding[0] if sliding else None
    if family.is_qwen:
        raw["use_sliding_window"] = bool(sliding)
    if family.is_qwen or family.kind == "ministral":
        raw["layer_types"] = [SLIDING if window else FULL for window in windows]
    return raw


def _context(model: ModelConfig, context: int) -> int:
    """`max_position_embeddings`, from which transformers takes the pretraining's context of a dynamic rope."""
    scaling = model.rope_scaling
    if scaling.kind == "dynamic":
        if model.max_positions not in (0, scaling.original_length):
            raise Unsupported(
                f"model.max_positions is {model.max_positions} but rope_scaling.original_length is "
                f"{scaling.original_length}: a dynamic rope of HuggingFace has one number for both."
            )
        return scaling.original_length
    return model.max_positions or context


def _family_of_model(model: ModelConfig) -> Family:
    """The class that computes what the model does."""
    plain = {
        "norm": (model.norm, "rmsnorm"),
        "norm_position": (model.norm_position, "pre"),
        "mlps": (set(model.mlps), {"swiglu"}),
        "position": (model.position, "rope"),
        "value_dim": (model.v_dim, model.head_dim),
        "scale_embeddings": (model.scale_embeddings, False),
        "scan_layers": (model.scan_layers, False),
        "rope_fraction": (model.rope_fraction, 1.0),
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
    if len(windows - {None}) > 1:
        raise Unsupported(
            f"windows {sorted(w for w in windows if w)}: a HuggingFace model has one window size for all its layers."
        )
    attention = "qkvo" if model.use_bias else model.attention_bias
    feed_forward = model.use_bias or model.mlp_bias
    if model.qk_norm:
        kind = "qwen3" if attention != "qkv" and not feed_forward else None
    elif attention == "qkv":
        kind = None if feed_forward else "qwen2"
    elif windows == {None}:
        kind = "llama"
    else:
        kind = None if attention != "none" or feed_forward else "mistral" if None not in windows else "ministral"
    if kind is None:
        found = {
            "qk_norm": model.qk_norm,
            "attention_bias": attention != "none" and attention,
            "mlp_bias": feed_forward,
            "a window": windows != {None},
        }
        raise Unsupported(
            f"{' with '.join(name for name, given in found.items() if given)} has no HuggingFace architecture among "
            f"{', '.join(BY_ARCHITECTURE)}: this model cannot be exported."
        )
    return next(family for family in BY_ARCHITECTURE.values() if family.kind == kind)


def _mixers(get: Fields, family: Family, layers: int) -> tuple[str, ...]:
    """softmax, with the sliding window in the layers that have one."""
    used = not family.is_qwen or get.value("use_sliding_window", bool, False)
    window = get.count("sliding_window", family.sliding_window, null=None) if used else None
    kinds = _layer_types(get, layers)
    if family.kind == "llama":
        # transformers computes a prompt without the window and cuts its cache to it, so that no text is well defined
        if window is not None:
            raise Unsupported(
                f"{get.origin}: sliding_window is {window} but a Llama has none; its class may be Mistral."
            )
        window, kinds = None, kinds and [FULL if kind == FULL else "" for kind in kinds]
    elif family.kind == "mistral":
        kinds = [SLIDING if window else FULL]
    elif family.kind == "ministral" and window is None:
        raise Unsupported(f"{get.origin}: layer_types needs sliding_window in a Mistral; leave both out, or give it.")
    if kinds is None:
        first = get.count("max_window_layers", family.max_window_layers, least=0) if family.is_qwen else 0
        kinds = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    if not all(kind in (FULL, SLIDING) for kind in kinds) or (SLIDING in kinds and window is None):
        raise get.wrong("layer_types", f"{FULL} where there is no window, for each of {layers} layers")
    names = {SLIDING: f"softmax(window={window})", FULL: "softmax"}
    if len(set(kinds)) == 1:
        return (names[kinds[0]],)
    return tuple(names[kind] for kind in kinds)


def _layer_types(get: Fields, layers: int) -> list[str] | None:
    found = get.value("layer_types", list, None, null=None) if get.names("layer_types") else None
    if found is None:
        return None
    if len(found) != layers or not all(isinstance(kind, str) and kind in LAYER_TYPES for kind in found):
        raise get.wrong("layer_types", f"a list of {SLIDING} or {FULL} for each of {layers} layers")
    return [LAYER_TYPES[kind] for kind in found]
