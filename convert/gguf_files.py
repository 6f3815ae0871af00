"""One GGUF file as configuration, tensors and tokenizer; dequantised by llama.cpp's own package `gguf`.

The structure of the file is proven here before the package, which trusts its counts and lengths, opens it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf_vocab import token_id
from convert.safetensors_files import finite
from jaxattn.errors import Corrupt, Incomplete, Unsupported
from jaxattn.rope import RopeScaling, frequencies

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0")
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
ROPE_TABLE = "rope_freqs.weight"  # divisors of the rotary frequencies
LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
MOST = {"tensors": 1 << 16, "metadata entries": 1 << 16, "array elements": 1 << 24, "bytes of a string": 1 << 24}
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


class Scanner:
    """Walks a GGUF header and refuses every length that cannot be true.

    Raises:
      Corrupt: the header lies. Incomplete: the file ends inside it. Unsupported: another version or byte order.
    """

    def __init__(self, data: Any, origin: str) -> None:
        self.data, self.at, self.origin = data, 0, origin
        if bytes(data[:4]) != b"GGUF":
            raise Corrupt(f"{origin} does not begin with GGUF; it is another kind of file or damaged.")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            raise Unsupported(f"{origin} has GGUF version {version}; versions 2 and 3 in little-endian order are read.")
        tensors, entries = self.count("<Q", "tensors"), self.count("<Q", "metadata entries")
        self.keys: set[str] = set()
        for _ in range(entries):
            key = self.string()
            if key in self.keys:
                raise Corrupt(f"{origin} names {key[:80]!r} twice; it is damaged.")
            self.keys.add(key)
            self.value(self.number("<I"))
        names: set[str] = set()
        for _ in range(tensors):
            name = self.string()
            if name in names:
                raise Corrupt(f"{origin} has tensor {name[:80]!r} twice; it is damaged.")
            names.add(name)
            dims = self.number("<I")
            if not 1 <= dims <= 4:
                raise Corrupt(f"{origin}: tensor {name[:80]!r} has {dims} dimensions; weights have 1 or 2.")
            total = 1
            for _ in range(dims):
                total *= self.number("<Q")
            self.number("<I")
            if self.number("<Q") > len(data) or total > 16 * len(data):  # no type packs more than 8 numbers in a byte
                raise Corrupt(f"{origin}: tensor {name[:80]!r} lies outside the file; download it again.")

    def number(self, form: str) -> int:
        end = self.at + struct.calcsize(form)
        if end > len(self.data):
            raise Incomplete(f"{self.origin} ends inside its header; download it again.")
        (value,) = struct.unpack(form, self.data[self.at : end])
        self.at = end
        return value

    def count(self, form: str, what: str) -> int:
        value = self.number(form)
        if value > MOST[what]:
            raise Corrupt(f"{self.origin} claims {value:,} {what}; more than {MOST[what]:,} are not believed.")
        return value

    def string(self) -> str:
        length = self.count("<Q", "bytes of a string")
        if self.at + length > len(self.data):
            raise Incomplete(f"{self.origin} ends inside its header; download it again.")
        raw = bytes(self.data[self.at : self.at + length])
        self.at += length
        return raw.decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in SCALARS:
            self.number(SCALARS[kind])
        elif kind == STRING:
            self.string()
        elif kind == ARRAY and depth < 2:
            inner, length = self.number("<I"), self.count("<Q", "array elements")
            if inner in SCALARS:
                self.at += length * struct.calcsize(SCALARS[inner])
                if self.at > len(self.data):
                    raise Incomplete(f"{self.origin} ends inside its header; download it again.")
            else:
                for _ in range(length):
                    self.value(inner, depth + 1)
        else:
            raise Corrupt(f"{self.origin} has a metadata value of kind {kind}, which GGUF does not have.")


class GgufFile:
    """An opened GGUF file.

    Raises:
      UserError: it cannot be read, lies about itself, or holds what is not supported.
    """

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                Scanner(data, str(path))
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise Incomplete(f"{path} cannot be read ({error}); download it again.") from error
        import gguf

        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
            self.tensors = {t.name: t for t in reader.tensors}
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError, struct.error) as error:
            raise Corrupt(
                f"{path} cannot be read ({type(error).__name__}: {str(error)[:100]}); download it again."
            ) from error
        self.path = path
        self.arch = str(self.fields.get("general.architecture"))
        if any("expert" in key for key in self.fields):
            raise Unsupported(f"{path}: a mixture of experts is not supported; use a dense model.")
        if self.arch not in ARCHITECTURES:
            raise Unsupported(f"{path}: architecture {self.arch[:40]!r} is not one of {', '.join(ARCHITECTURES)}.")

    def field(self, name: str, default: Any = None) -> Any:
        """`ARCH.name`. Raises `Incomplete` if it is missing and has no default."""
        found = self.fields.get(f"{self.arch}.{name}", default)
        if found is None:
            raise Incomplete(f"{self.path}: {self.arch}.{name} is missing; it is needed and not guessed.")
        return found

    def config(self) -> dict[str, Any]:
        """What the file says, as a HuggingFace `config.json`."""
        heads, width = self.field("attention.head_count"), self.field("embedding_length")
        if isinstance(heads, list) or isinstance(self.field("attention.head_count_kv", heads), list):
            raise Unsupported(f"{self.path}: head counts that differ between layers are not supported.")
        rope: dict[str, Any] = {"rope_theta": self.field("rope.freq_base"), "rope_type": "default"}
        kind = self.field("rope.scaling.type", "none")
        if kind != "none":
            rope |= {"rope_type": kind, "factor": self.field("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.field("rope.scaling.original_context_length")
        head_dim = self.field("attention.key_length", width // heads)
        rotated = self.field("rope.dimension_count", head_dim)
        if rotated != head_dim:
            rope["partial_rotary_factor"] = rotated / head_dim
        if ROPE_TABLE in self.tensors:
            rope |= self._llama3(int(rotated), rope["rope_theta"])
        name = ARCHITECTURES[self.arch]
        raw = {
            "architectures": [name],
            "model_type": self.arch,
            "vocab_size": int(self.tensors["token_embd.weight"].shape[-1])
            if "token_embd.weight" in self.tensors
            else 0,
            "hidden_size": width,
            "intermediate_size": self.field("feed_forward_length"),
            "num_hidden_layers": self.field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.field("context_length"),
            # GGUF stores f32; seven digits give back the decimal number that was written
            "rms_norm_eps": float(f"{self.field('attention.layer_norm_rms_epsilon'):.7g}"),
            "rope_parameters": rope,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "dtype": "float32",
        }
        for key, field in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
            if (number := token_id(self.fields, field, str(self.path))) is not None:
                raw[key] = number
        return raw

    def _llama3(self, rotated: int, base: float) -> dict[str, Any]:
        """The scaling whose table of divisors the file holds: those of Llama 3.1 to 3.3 differ in the factor alone."""
        from gguf.quants import dequantize

        tensor = self.tensors[ROPE_TABLE]
        table = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float64).reshape(-1)
        if table.size == rotated // 2 and np.all(np.isfinite(table)) and table.max() >= 1:
            scaling = RopeScaling("llama3", float(f"{table.max():.6g}"), **LLAMA3)
            if np.allclose(frequencies(rotated, base) / frequencies(rotated, base, scaling=scaling), table, rtol=1e-3):
                names = {"original_length": "original_max_position_embeddings"}
                rope = {names.get(name, name): value for name, value in LLAMA3.items()}
                return {"rope_type": "llama3", "factor": scaling.factor, **rope}
        raise Unsupported(
            f"{self.path} holds a table of rotary frequencies ({ROPE_TABLE}) that is not Llama 3's; "
            "convert the safetensors checkpoint instead."
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """HuggingFace name -> [out, in] of every tensor. Raises `Unsupported` for a quantisation not in `TYPES`."""
        found = {}
        for name, tensor in self.tensors.items():
            if tensor.tensor_type.name not in TYPES:
                raise Unsupported(
                    f"tensor {name!r} of {self.path} is {tensor.tensor_type.name}; only {', '.join(TYPES)} are read."
                )
            if name != ROPE_TABLE:
                found[hf_name(name)] = tuple(int(n) for n in tensor.shape[::-1])
        return found

    def read_all(self) -> Iterator[tuple[str, np.ndarray]]:
        """HuggingFace name and f32 values of every tensor, one in memory at a time."""
        from gguf.quants import dequantize

        for name, tensor in self.tensors.items():
            if name == ROPE_TABLE:
                continue
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            values = values.reshape(tuple(int(n) for n in tensor.shape[::-1]))
            if self.arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                values = self._halves(name, values)
            yield hf_name(name), finite(name, values, str(self.path))

    def _halves(self, name: str, values: np.ndarray) -> np.ndarray:
        """llama.cpp interleaves the rotary pairs of Llama's q and k; here a pair is (m, m + D/2)."""
        heads = self.field("attention.head_count")
        if name.endswith("attn_k.weight"):
            heads = self.field("attention.head_count_kv", heads)
        out, width = values.shape
        return values.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    if name in NAMES:
        return NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in NAMES:
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.{parts[3]}"
    return name
