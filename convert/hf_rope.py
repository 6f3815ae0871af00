"""The rotary part of a `config.json`, by the precedence of transformers 5.24, and back.

`rope_scaling`, where it is not empty, replaces `rope_parameters` as a whole. Then a value inside counts before the same
one at top level, but for `original_max_position_embeddings`, where the top level counts first. Without any base it is
10000, the default of all these classes.
"""

from __future__ import annotations

import math
from typing import Any

from convert.hf_fields import Fields, as_number
from jaxattn.errors import ConfigError, Corrupt, Unsupported, shown
from jaxattn.rope import RopeScaling

Json = dict[str, Any]
KINDS = {name: name for name in ("linear", "dynamic", "yarn", "llama3", "longrope")} | {"default": "none"}
DEFAULT_BASE = 10_000.0


def read(get: Fields, head_dim: int, context: int) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary angles of heads of `head_dim`.

    Raises:
      Corrupt: a value is missing or no value of its kind.
      Unsupported: a kind of scaling that is not computed here.
    """
    inner = chosen(get)
    base = _base(get, inner)
    kind = inner.value("rope_type", str, None if inner.names("rope_type") else inner.value("type", str, "default"))
    if kind not in KINDS:
        raise Unsupported(f"{get.origin}: rope_type {shown(kind)} is not supported; only {', '.join(KINDS)} are.")
    if head_dim % 2:
        raise Unsupported(f"{get.origin}: heads have {head_dim} dims, but only an even number can be rotated in pairs.")
    _check_fraction(get, inner, kind, head_dim)
    if kind == "default":
        return base, RopeScaling()
    if kind == "yarn" and base == 1:
        raise Corrupt(f"{get.origin}: rope_theta is 1 but YaRN tells pairs apart by their speed; use another base.")
    try:
        return base, RopeScaling(kind=KINDS[kind], **_fields(kind, get, inner, head_dim, context))
    except ConfigError as error:
        raise Corrupt(f"{get.origin}: {error}") from error


def chosen(get: Fields) -> Fields:
    """The object that counts: `rope_scaling` if there is anything in it, else `rope_parameters`."""
    for field in ("rope_parameters", "rope_scaling"):
        value = get.raw.get(field)
        if not isinstance(value, dict) and value is not None and (value or field == "rope_parameters"):
            raise get.wrong(field, "an object")
    name = "rope_scaling" if get.raw.get("rope_scaling") else "rope_parameters"
    value = get.raw.get(name) or {}
    if any(isinstance(v, dict) for v in value.values()):
        raise Unsupported(f"{get.origin}: {name} differs between layers, which is not supported.")
    return Fields(value, f"{get.origin}: {name}")


def note(get: Fields) -> str | None:
    """A sentence for a base in `rope_parameters` that `rope_scaling` puts out of force."""
    before, now = get.raw.get("rope_parameters"), chosen(get)
    if not isinstance(before, dict) or now.raw is before or before.get("rope_theta") is None:
        return None
    base = _base(get, now)
    if before["rope_theta"] == base:
        return None
    return (
        f"rope_scaling replaces rope_parameters as a whole, as in transformers: the rotary base is {base:g}, not "
        f"{shown(before['rope_theta'])}; write rope_theta into rope_scaling if that was not meant."
    )


def write(base: float, scaling: RopeScaling) -> Json:
    """`rope_parameters` that `read` gives back."""
    rope: Json = {"rope_theta": base, "rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if scaling.kind != "none":
        rope["factor"] = scaling.factor
    if scaling.kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        rope |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if scaling.kind in ("yarn", "longrope"):
        rope["attention_factor"] = scaling.amplitude
    return rope


def _base(get: Fields, inner: Fields) -> float:
    outside = get.number("rope_theta", DEFAULT_BASE, null=None)
    if inner.names("rope_theta"):
        return inner.number("rope_theta")
    if outside is None:
        raise get.wrong("rope_theta", "a positive number")
    return outside


def _check_fraction(get: Fields, inner: Fields, kind: str, head_dim: int) -> None:
    """These classes rotate whole heads: the key does nothing without scaling, and does not fit with it."""
    owner = inner if inner.names("partial_rotary_factor") else get
    if owner is inner and kind != "default":
        fraction = inner.number("partial_rotary_factor")  # null here is no default
    else:
        fraction = owner.number("partial_rotary_factor", 1.0, null=1.0)
    if kind != "default" and (fraction > 1 or int(head_dim * fraction) != head_dim):
        raise Unsupported(
            f"{owner.origin}: partial_rotary_factor is {fraction} but this architecture rotates whole heads; "
            "transformers fails on it with a scaled rope, and it is refused here."
        )


def _fields(kind: str, get: Fields, inner: Fields, head_dim: int, context: int) -> Json:
    if kind == "linear":
        return {"factor": inner.number("factor")}
    if kind == "dynamic":
        if head_dim == 2:
            raise Unsupported(f"{get.origin}: a dynamic rope needs heads of more than 2 dims.")
        return {"factor": inner.number("factor"), "original_length": context}
    outside = get.names("original_max_position_embeddings")
    original = (get if outside else inner).count("original_max_position_embeddings", context)
    found: Json = {"original_length": original}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return found | {name: inner.number(name) for name in names}
    if kind == "longrope":
        return found | _longrope(inner, head_dim, context, original)
    if not inner.names("factor"):
        raise Corrupt(f"{inner.origin}: factor is missing; it is needed and not guessed.")
    factor = inner.number("factor", null=context / original)
    either = lambda field, default: inner.number(field) if inner.raw.get(field) else default  # 0 is the default, too
    found |= {"factor": factor, "beta_fast": either("beta_fast", 32.0), "beta_slow": either("beta_slow", 1.0)}
    found |= {"truncate": inner.value("truncate", bool, True, null=False)}
    return found | {"attention_factor": _yarn_amplitude(inner, factor)}


def _yarn_amplitude(inner: Fields, factor: float) -> float:
    """YaRN's factor of cos and sin, with DeepSeek's two numbers where they are given."""
    if inner.has("attention_factor"):
        return inner.number("attention_factor")
    grow = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    if inner.raw.get("mscale") and inner.raw.get("mscale_all_dim"):
        return grow(inner.number("mscale")) / grow(inner.number("mscale_all_dim"))
    return grow(1.0)


def _longrope(inner: Fields, head_dim: int, context: int, original: int) -> Json:
    found: Json = {}
    for ours, field in (("short_factors", "short_factor"), ("long_factors", "long_factor")):
        values = inner.value(field, list)
        numbers = [as_number(value) for value in values] if len(values) == head_dim // 2 else []
        if not numbers or not all(number is not None and number > 0 for number in numbers):
            raise inner.wrong(field, f"a list of {head_dim // 2} positive numbers")
        found[ours] = tuple(numbers)
    factor = inner.number("factor", context / original, null=context / original)
    found["factor"] = max(1.0, factor)  # without a stretch the amplitude is 1
    if inner.has("attention_factor"):
        return found | {"attention_factor": inner.number("attention_factor")}
    if factor > 1 and original < 2:
        raise Corrupt(f"{inner.origin}: original_max_position_embeddings is 1, of which longrope takes the logarithm.")
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return found | {"attention_factor": grown}
