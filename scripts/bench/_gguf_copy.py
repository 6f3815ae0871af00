"""A GGUF file written anew with all tensors in one float type, for llama.cpp to run at that precision."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def copy_as(source: Path, target: Path, dtype: str) -> None:
    """Write `source`'s metadata and dequantised tensors to `target`; vectors stay f32, as llama.cpp wants them."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    for part in reader.tensors:
        values = gguf.dequantize(part.data, part.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(part.name, values)
        else:
            writer.add_tensor(part.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
