"""One GGUF file as configuration and tensors; dequantised by llama.cpp's own package `gguf`.

What is read, and what is refused, are the rules of llama.cpp's loader for these architectures.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import gguf_rope
from convert.gguf_header import Header, TensorPlace
from convert.hf_fields import Fields, check_ids
from convert.safetensors_files import finite
from jaxattn.errors import ConfigError, Corrupt, Incomplete, Mismatch, Unsupported, UserError, shown

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_TABLE = "rope_freqs.weight"  # divisors of the rotary frequencies; llama.cpp knows them for llama alone
TWO_TABLES = {"rope_factors_long.weight", "rope_factors_short.weight"}
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Which linear maps may have a bias; a map without one has the bias 0.
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
BIASES = {"llama": (*ATTENTION, *FEED_FORWARD), "qwen2": ATTENTION[:3], "qwen3": ATTENTION}
# Metadata of other architectures that the loader passes over for these.
UNREAD = (
    "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attn_logit_softcapping",
    "final_logit_softcapping", "logit_scale", "residual_scale", "embedding_scale", "attention.temperature_length",
)  # fmt: skip


class GgufFile:
    """An opened GGUF file: `fields` (its metadata) and `tensors` by name.

    Raises:
      UserError: it cannot be read, lies about itself, or holds what is not supported.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise Incomplete(f"{path} cannot be read ({error}); download it again.") from error
        self.path, self._data = path, data
        header = Header(data, str(path))
        self.fields: Mapping[str, Any] = header
        self.tensors, self._begin = header.tensors, header.data
        self.arch = str(self.fields.get("general.architecture"))
        self.get = Fields(self.fields, str(path), f"{self.arch}.")
        self._check_kind()
        self._types = {place.name: self._type(place) for place in self.tensors.values()}

    def _check_kind(self) -> None:
        """Refuse what is no dense decoder in one file."""
        if self.arch not in ARCHITECTURES:
            raise Unsupported(f"{self.path}: architecture {shown(self.arch)} is not one of {', '.join(ARCHITECTURES)}.")
        whole = Fields(self.fields, str(self.path))
        if whole.count("split.count", 1, least=0) > 1:
            raise Unsupported(
                f"{self.path} is one of {self.fields['split.count']} parts; join them with llama-gguf-split --merge."
            )
        for key in ("expert_count", "expert_used_count"):
            if self.get.count(key, 0, least=0):
                raise Unsupported(f"{self.path}: a mixture of experts is not supported; use a dense model.")
        if not self.get.value("attention.causal", bool, True):
            raise Unsupported(f"{self.path}: {self.arch}.attention.causal is false; only causal models are supported.")

    def _type(self, place: TensorPlace) -> Any:
        """ggml's type of a tensor, whose data lie in the file and which `gguf` can dequantise."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(place.kind)
        except ValueError as error:
            raise Unsupported(
                f"tensor {shown(place.name)} of {self.path} has type number {place.kind}, which gguf does not know."
            ) from error
        if kind not in readable():
            known = ", ".join(sorted(found.name for found in readable()))
            raise Unsupported(f"tensor {shown(place.name)} of {self.path} is {kind.name}; only {known} are read.")
        block, size = GGML_QUANT_SIZES[kind]
        if place.dims[0] % block:
            raise Corrupt(
                f"tensor {shown(place.name)} of {self.path} has rows of {place.dims[0]}, not whole blocks of {block}."
            )
        if self._begin + place.offset + math.prod(place.dims) // block * size > len(self._data):
            raise Incomplete(f"tensor {shown(place.name)} of {self.path} ends behind the file; download it again.")
        return kind

    def values(self, name: str) -> np.ndarray:
        """f32 [out, in] of a tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        place, kind = self.tensors[name], self._types[name]
        block, size = GGML_QUANT_SIZES[kind]
        # Read anew for each tensor: the pages of a mapped file that were read count as this process's memory.
        with open(self.path, "rb") as file:
            file.seek(self._begin + place.offset)
            raw = np.frombuffer(file.read(math.prod(place.dims) // block * size), np.uint8)
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        raw = raw.view(plain[kind]) if kind in plain else raw.reshape(-1, place.dims[0] // block * size)
        return np.asarray(dequantize(raw, kind), np.float32).reshape(place.shape)

    def config(self) -> dict[str, Any]:
        """What the file says, as a HuggingFace `config.json`.

        Raises:
          UserError: naming the key that is missing, of the wrong kind, or not supported.
        """
        get, origin = self.get, str(self.path)
        layers, width = get.count("block_count"), get.count("embedding_length")
        heads = self._per_layer("attention.head_count", layers)
        kv_heads = self._per_layer("attention.head_count_kv", layers, heads)
        head_dim = get.count("attention.key_length", width // heads)
        for key, default in (("attention.value_length", width // heads), ("rope.dimension_count", head_dim)):
            if (found := get.count(key, default)) != head_dim:
                raise Unsupported(
                    f"{origin}: {self.arch}.{key} is {found} but heads have {head_dim} dims, all of which a "
                    f"{self.arch} rotates and reads; llama.cpp refuses it too."
                )
        context = get.count("context_length")
        if self.fields.get(f"{self.arch}.rope.scaling.type") == "longrope" and TWO_TABLES & set(self.tensors):
            raise Unsupported(
                f"{origin}: {self.arch}.rope.scaling.type is longrope, of whose two tables llama.cpp picks one by the "
                "room a context is opened with, not by the text; convert the safetensors checkpoint instead."
            )
        table = None
        if ROPE_TABLE in self.tensors and self.arch == "llama":
            table = gguf_rope.check_table(self.values(ROPE_TABLE), head_dim, origin)
        try:
            rope = gguf_rope.rope_parameters(get, head_dim, context, table)
        except ConfigError as error:
            raise Mismatch(f"{origin}: {error}") from error
        embedding = self.tensors.get("token_embd.weight")
        rows = embedding.shape[0] if embedding else 0
        names = self.fields.length("tokenizer.ggml.tokens") if isinstance(self.fields, Header) else None
        if embedding and names is not None and names != rows:
            raise Mismatch(f"{origin} names {names:,} tokens but its embedding has {rows:,} rows; it is damaged.")
        biased = {kind for kind in BIASES[self.arch] if any(n.endswith(f".{kind}.bias") for n in self.tensors)}
        raw = {
            "architectures": [ARCHITECTURES[self.arch]],
            "model_type": self.arch,
            "vocab_size": rows,
            "hidden_size": width,
            "intermediate_size": self._per_layer("feed_forward_length", layers),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": context,
            # GGUF stores f32; seven digits give back the decimal number that was written
            "rms_norm_eps": float(f"{get.number('attention.layer_norm_rms_epsilon'):.7g}"),
            "rope_parameters": rope,
            "attention_bias": bool(biased.intersection(ATTENTION)) and self.arch != "qwen2",
            "mlp_bias": bool(biased.intersection(FEED_FORWARD)),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "dtype": "float32",
        }
        ids = Fields(self.fields, origin, "tokenizer.ggml.")
        check_ids(ids, ("bos_token_id", "eos_token_id", "padding_token_id"))
        for key, field in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            if ids.has(f"{field}_token_id"):
                raw[key] = self.fields[f"tokenizer.ggml.{field}_token_id"]
        return raw

    def notes(self) -> list[str]:
        """What the file says and llama.cpp passes over, although it looks as if it mattered: one sentence each."""
        found = gguf_rope.unread(self.get)
        window = self.fields.get(f"{self.arch}.attention.sliding_window")
        if window is not None and window != 0:
            found.append(
                f"{self.arch}.attention.sliding_window is {shown(window)}; llama.cpp does not read it for a "
                f"{self.arch}, and every token sees all before it here too."
            )
        for key in UNREAD:
            if (value := self.fields.get(f"{self.arch}.{key}")) is not None:
                found.append(
                    f"{self.arch}.{key} is {shown(value)}; llama.cpp does not read it for a {self.arch}, and neither "
                    "is it read here."
                )
        return found

    def _per_layer(self, field: str, layers: int, default: int | None = None) -> int:
        """A number that may be given for every layer, where it must be the same."""
        key = f"{self.arch}.{field}"
        count = self.fields.length(key) if isinstance(self.fields, Header) else None
        if count is None:
            return self.get.count(field, default)
        if count != layers:
            raise Corrupt(f"{self.path}: {key} has {count:,} numbers but there are {layers:,} layers.")
        values = set(self.fields[key])
        if len(values) != 1:
            raise Unsupported(f"{self.path}: {key} is {shown(self.fields[key])}; layers that differ are not supported.")
        return Fields({key: values.pop()}, str(self.path)).count(key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HuggingFace name -> [out, in] of every tensor."""
        known = {name: place.shape for name, place in self.tensors.items()}
        if self.arch == "llama":
            known.pop(ROPE_TABLE, None)
        return {hf_name(name): shape for name, shape in known.items()} | {
            hf_name(name): shape for name, shape in self._absent_biases().items()
        }

    def _absent_biases(self) -> dict[str, tuple[int, ...]]:
        """Biases that the architecture has and the file leaves out: they are 0."""
        absent = {}
        for group in (ATTENTION, FEED_FORWARD):
            kinds = [kind for kind in BIASES[self.arch] if kind in group]
            given = any(name.endswith(tuple(f".{kind}.bias" for kind in kinds)) for name in self.tensors)
            if not kinds or not (given or self.arch == "qwen2"):
                continue
            for name, place in self.tensors.items():
                stem = name.removesuffix(".weight")
                if stem != name and stem.endswith(tuple(f".{kind}" for kind in kinds)) and len(place.dims) == 2:
                    absent[f"{stem}.bias"] = (place.shape[0],)
        return {name: shape for name, shape in absent.items() if name not in self.tensors}

    def read_all(self) -> Iterator[tuple[str, np.ndarray]]:
        """HuggingFace name and f32 values of every tensor, one in memory at a time."""
        for name in self.tensors:
            if name == ROPE_TABLE and self.arch == "llama":
                continue
            values = self.values(name)
            if self.arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")):
                values = self._halves(name, values)
            yield hf_name(name), finite(name, values, str(self.path))
        for name, shape in self._absent_biases().items():
            yield hf_name(name), np.zeros(shape, np.float32)

    def _halves(self, name: str, values: np.ndarray) -> np.ndarray:
        """llama.cpp interleaves the rotary pairs of Llama's q and k; here a pair is (m, m + D/2)."""
        layers = self.get.count("block_count")
        heads = self._per_layer("attention.head_count", layers)
        if ".attn_k." in name:
            heads = self._per_layer("attention.head_count_kv", layers, heads)
        rows = values.shape[0]
        return values.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


@functools.cache
def readable() -> frozenset[Any]:
    """The types that `gguf` can dequantise, asked of it with a block of zeros each."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: pip install 'jaxattn[gguf]'.") from error

    def can(kind: Any, size: int) -> bool:
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    return frozenset(kind for kind, (_, size) in GGML_QUANT_SIZES.items() if can(kind, size))


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    if name in NAMES:
        return NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in NAMES:
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return name
