"""The rotary angles of a GGUF file by the rules of llama.cpp's loader, as HuggingFace's `rope_parameters`.

One pair m of d/2 turns, per position, by base^(-2m/d) / table[m], stretched by `rope.scaling.*`; cos and sin are
multiplied by `rope.scaling.attn_factor`, and under YaRN by 0.1 ln(factor) + 1 besides. What HuggingFace has no name
for becomes its longrope, which can give every pair a divisor of its own.

Rules and numbers are those of llama.cpp of October 2026 (ggml 0.27.0): tests/convert/llama_cpp.json.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convert.hf_fields import Fields
from jaxattn.errors import ConfigError, Unsupported, shown
from jaxattn.rope import RopeScaling, frequencies

LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
KINDS = ("none", "linear", "yarn", "longrope")
BETA_FAST, BETA_SLOW = 32.0, 1.0  # what llama.cpp uses for these architectures, whatever the file says
# Metadata that the loader does not read for these architectures, and the value that makes no difference.
UNREAD = {
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": BETA_FAST,
    "rope.scaling.yarn_beta_slow": BETA_SLOW,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.freq_base_swa": None,
    "rope.dimension_sections": None,
}


def rope_parameters(get: Fields, head_dim: int, context: int, table: np.ndarray | None) -> dict[str, Any]:
    """HuggingFace's form of the rotary angles of heads of `head_dim`.

    Args:
      table: `rope_freqs.weight` [D/2], the divisors of the pairs, where the file has it.

    Raises:
      Corrupt: a value of the wrong kind. Unsupported: angles that depend on how llama.cpp is started.
    """
    base = get.number("rope.freq_base", 10_000.0)
    kind = get.value("rope.scaling.type", str, "linear")
    if kind not in KINDS:
        raise get.wrong("rope.scaling.type", f"one of {', '.join(KINDS)}")
    key = "rope.scaling.factor" if get.has("rope.scaling.factor") else "rope.scale_linear"  # its old name
    factor = 1.0 if get.raw.get(get.prefix + key) == 0 else get.number(key, 1.0)
    factor = 1.0 if kind == "none" else factor
    original = get.count("rope.scaling.original_context_length", context, least=0) or context
    amplitude = get.number("rope.scaling.attn_factor", 1.0)
    rope: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    if kind == "yarn" and factor >= 1:
        amplitude *= 0.1 * math.log(factor) + 1
    if table is None and factor >= 1:
        if kind == "yarn" and _ordinary_ramp(head_dim, base, original):
            return {
                **rope, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
                "attention_factor": amplitude,
            }  # fmt: skip
        if kind != "yarn" and amplitude == 1:
            return rope if factor == 1 else {**rope, "rope_type": "linear", "factor": factor}
    if table is not None and amplitude == factor == 1 and kind != "yarn":
        scaling = llama3_of(table, head_dim, base)
        if scaling is not None:
            names = {"original_length": "original_max_position_embeddings"}
            return {
                **rope, "rope_type": "llama3", "factor": scaling.factor,
                **{names.get(name, name): value for name, value in LLAMA3.items()},
            }  # fmt: skip
    if kind == "yarn" and factor < 1:
        raise Unsupported(f"{get.origin}: {get.prefix}{key} is {factor} but YaRN stretches by at least 1.")
    divisors = _divisors(head_dim, base, kind, factor, original, table)
    return {
        **rope, "rope_type": "longrope", "factor": 1.0, "attention_factor": amplitude,
        "original_max_position_embeddings": context, "short_factor": divisors, "long_factor": divisors,
    }  # fmt: skip


def check_table(table: np.ndarray, head_dim: int, origin: str) -> np.ndarray:
    """The table as f64 [D/2]. Raises `Unsupported` if it is no table of positive divisors."""
    table = np.asarray(table, np.float64).reshape(-1)
    if table.size != head_dim // 2 or not np.all(np.isfinite(table) & (table > 0)):
        raise Unsupported(
            f"{origin}: rope_freqs.weight is {shown(table.tolist())} but must hold {head_dim // 2} positive divisors."
        )
    return table


def llama3_of(table: np.ndarray, head_dim: int, base: float) -> RopeScaling | None:
    """The Llama 3 scaling that has these divisors: those of Llama 3.1 to 3.3 differ in the factor alone."""
    if table.max() < 1:
        return None
    scaling = RopeScaling("llama3", float(f"{table.max():.6g}"), **LLAMA3)
    wanted = frequencies(head_dim, base) / frequencies(head_dim, base, scaling=scaling)
    return scaling if np.allclose(wanted, table, rtol=1e-5) else None


def unread(get: Fields) -> list[str]:
    """What the file says and llama.cpp passes over, where it would make a difference: one sentence each."""
    found = []
    for key, neutral in UNREAD.items():
        value = get.raw.get(get.prefix + key)
        if value is not None and value != neutral:
            found.append(
                f"{get.prefix}{key} is {shown(value)}; llama.cpp does not read it, and neither is it read here."
            )
    return found


def _ramp(head_dim: int, base: float, original: int) -> tuple[float, float]:
    if base == 1:
        raise ConfigError("rope.freq_base is 1 but YaRN tells pairs apart by their speed.")
    pair = lambda beta: head_dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(base))
    low, high = math.floor(pair(BETA_FAST)), math.ceil(pair(BETA_SLOW))
    return max(0, low), min(head_dim - 1, high)


def _ordinary_ramp(head_dim: int, base: float, original: int) -> bool:
    """Whether the ramp rises, for only then llama.cpp and HuggingFace have the same."""
    low, high = _ramp(head_dim, base, original)
    return low <= high


def _divisors(
    head_dim: int, base: float, kind: str, factor: float, original: int, table: np.ndarray | None
) -> list[float]:
    """What each pair's angle base^(-2m/D) is divided by."""
    half = head_dim // 2
    stretch = np.full(half, 1 / factor)
    if kind == "yarn":
        low, high = _ramp(head_dim, base, original)
        keep = 1 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0, 1)
        stretch = keep + (1 - keep) / factor
    return ((1 if table is None else table) / stretch).tolist()
