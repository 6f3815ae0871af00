"""`python -m convert.to_hf SRC DST`: a jaxattn checkpoint becomes a HuggingFace folder of safetensors.

SRC is a converted checkpoint or a run whose architecture HuggingFace has (softmax layers, RMSNorm, SwiGLU, rotary
positions). A converted one that was not changed comes back byte for byte: same names, dtypes, files and JSON. A run of
text brings its tokenizer and its end of text along, so that transformers opens the folder as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from convert import hf_config, rules
from convert import safetensors_files as st
from convert.from_hf import EMBEDDING, HEAD
from convert.sources import reading, side_names
from jaxattn.command import run_cli
from jaxattn.errors import Unsupported, UserError
from jaxattn.json_text import as_object, optional_object, read_object
from jaxattn.models import ModelConfig
from jaxattn.new_folder import new_folder
from jaxattn.places import SIDE
from jaxattn.runs.config import RunConfig
from jaxattn.runs.leaf_io import named
from jaxattn.runs.load import load_params, read_config
from jaxattn.runs.run_tokenizer import trained_tokenizer

MOST_BYTES = 5 << 30  # of one file
FLOATS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32", "float32": "source"}


def export(src: Path, dst: Path, *, dtype: str = "source", step: int | None = None, tokenizer: bool = True) -> Path:
    """Write DST and return it.

    Args:
      tokenizer: whether a run of text brings its own.

    Raises:
      UserError: no checkpoint, an architecture HuggingFace does not have, or DST exists; DST is then as it was.
    """
    cfg = read_config(src)
    params, _ = load_params(src, cfg, step, dtype=None)
    flat = named(params)
    wanted = rules.pairs(cfg.model)
    tensors = {}
    for name, pair in wanted.items():
        array = pair.theirs(np.asarray(flat[pair.path]))
        tensors[name] = np.ascontiguousarray(array if dtype == "source" else _cast(name, array, dtype))
    layout = _layout(src, tensors, cfg.model)
    if HEAD in layout and cfg.model.tie_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]
    kept = _side_files(src, cfg, tensors, tokenizer)
    with new_folder(dst) as partial:
        _write_files(partial, tensors, layout, kept)
    return dst


def _cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Raises `UserError` if a number of the array is infinite in `dtype`."""
    with np.errstate(over="ignore"):
        made = array.astype(np.dtype(dtype))
    if not np.isfinite(made).all():
        most = float(np.abs(array).max())
        raise UserError(
            f"tensor {name!r} has numbers up to {most:.6g}, which {dtype} does not hold: use --dtype {WIDER[dtype]}."
        )
    return made


def _layout(src: Path, tensors: dict[str, np.ndarray], model: ModelConfig) -> dict[str, str]:
    """Tensor -> file: the source's own if it names the same tensors, else files of at most `MOST_BYTES`."""
    path = src / "provenance.json"
    if path.exists():
        layout = read_object(path).get("layout", {})
        kept = {name: file for name, file in layout.items() if not any(r.fullmatch(name) for r in rules.COMPUTED)}
        names = set(tensors) | ({HEAD} if model.tie_embeddings and HEAD in kept else set())
        plain = all(isinstance(f, str) and st.FILE_NAME.fullmatch(f) for f in kept.values())
        if set(kept) == names and plain:
            return kept
    groups: list[list[str]] = [[]]
    size = 0
    for name, array in tensors.items():
        if groups[-1] and size + array.nbytes > MOST_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += array.nbytes
    if len(groups) == 1:
        return dict.fromkeys(tensors, st.SINGLE)
    of = len(groups)
    return {name: f"model-{i:05d}-of-{of:05d}.safetensors" for i, group in enumerate(groups, 1) for name in group}


def _side_files(src: Path, cfg: RunConfig, tensors: dict[str, np.ndarray], tokenizer: bool) -> dict[str, bytes]:
    """The source's own files or those of the run's tokenizer, and a config.json of the model and the tensors' dtype."""
    folder, model = src / SIDE, cfg.model
    with reading(folder):
        kept = {name: (folder / name).read_bytes() for name in side_names(folder) if (folder / name).is_file()}
    dtype = _common_dtype(tensors)
    raw, ids = None, {}
    if "config.json" in kept:
        raw = as_object(kept["config.json"], str(folder / "config.json"), strict=True)
        if hf_config.parse(raw) != model:
            raw, ids = None, {key: raw[key] for key in hf_config.TOKEN_IDS if key in raw}
    elif not kept:
        kept, ids = _own_tokenizer(src, cfg) if tokenizer else ({}, {})
    if raw is None:
        kept["config.json"] = _json(hf_config.write(model, dtype, context=cfg.data.context, ids=ids))
    before = optional_object(src / "provenance.json").get("dtypes")
    if before != sorted({x.dtype.name for x in tensors.values()}):
        kept.pop(st.INDEX, None)  # its total size is that of another dtype
        if raw is not None:
            kept["config.json"] = _json({k: v for k, v in raw.items() if k != "torch_dtype"} | {"dtype": dtype})
    return kept


def _own_tokenizer(src: Path, cfg: RunConfig) -> tuple[dict[str, bytes], dict[str, int | None]]:
    """Files of the tokenizer that a run was trained with, and its token ids; none for a run that is not of text.

    Raises:
      UserError: the tokenizer cannot be opened.
    """
    try:
        own = trained_tokenizer(src, cfg)
    except UserError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{reason}; --no-tokenizer exports without it.") from error
    ids: dict[str, int | None] = {key: None for key in hf_config.TOKEN_IDS}
    if own is None:
        return {"generation_config.json": _json(ids)}, ids
    ids |= {"bos_token_id": own.bos, "eos_token_id": own.eos, "pad_token_id": own.eos if own.pad is None else own.pad}
    described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    described["model_max_length"] = cfg.data.context
    if own.eos is not None:
        token = own.token(own.eos)
        described |= {"eos_token": token, "pad_token": token}
    described |= own.named
    return {
        "tokenizer.json": own.to_json().encode(),
        "tokenizer_config.json": _json(described),
        "generation_config.json": _json(ids),
    }, ids


def _write_files(folder: Path, tensors: dict[str, np.ndarray], layout: dict[str, str], kept: dict[str, bytes]) -> None:
    files: dict[str, dict[str, np.ndarray]] = {}
    for name in tensors:
        files.setdefault(layout[name], {})[name] = tensors[name]
    for name, group in files.items():
        st.save(group, folder / name)
    if len(files) == 1:
        kept = {name: raw for name, raw in kept.items() if name != st.INDEX}
    elif st.INDEX not in kept or as_object(kept[st.INDEX], st.INDEX).get("weight_map") != layout:
        total = sum(x.nbytes for x in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(layout.items()))}
        kept = {**kept, st.INDEX: _json(index)}
    for name, raw in kept.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(raw)


def _common_dtype(tensors: dict[str, np.ndarray]) -> str:
    names = {x.dtype.name for x in tensors.values()}
    if not names <= set(FLOATS):
        raise Unsupported(f"parameters of dtype {', '.join(sorted(names))} cannot be exported; use --dtype.")
    return names.pop() if len(names) == 1 else "float32"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.to_hf", description=__doc__)
    parser.add_argument("src", type=Path, help="converted checkpoint or run folder")
    parser.add_argument("dst", type=Path, help="folder to create")
    parser.add_argument("--dtype", choices=("source", *FLOATS), default="source", help="of the written tensors")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest valid one)")
    parser.add_argument("--no-tokenizer", action="store_true", help="leave out the tokenizer of a run trained here")
    args = parser.parse_args()
    folder = export(args.src, args.dst, dtype=args.dtype, step=args.step, tokenizer=not args.no_tokenizer)
    print(f"exported: {folder}")
    return 0


if __name__ == "__main__":
    run_cli(main)
