"""`python -m convert.from_hf SRC DST`: a HuggingFace folder, GGUF file or hub name becomes a jaxattn checkpoint.

DST is a run folder like those of `train.pretrain`: `config.json`, one Orbax checkpoint (step 0) with only the
parameters, the tokenizer and the source's own JSON files under `hf/`, and `provenance.json` (files, sha256, versions).
It exists only once it is whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

from convert import hf_config, rules
from convert.sources import Source, open_source, reading
from jaxattn.command import run_cli
from jaxattn.errors import UserError
from jaxattn.hf_tokenizer import has_tokenizer
from jaxattn.models import ModelConfig
from jaxattn.new_folder import new_folder
from jaxattn.open_tokenizer import byte_tokenizer
from jaxattn.places import SIDE
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.config import EvalConfig, RunConfig
from jaxattn.runs.data_config import DataConfig
from jaxattn.runs.load import read_config
from jaxattn.runs.manifest import hash_file
from jaxattn.runs.rundir import versions, write_json_atomic
from jaxattn.tokenizer import read_tokenizer

DTYPES = ("source", "float32", "bfloat16")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_params(
    source: Source, model: ModelConfig, *, dtype: str = "source", progress: Any = None
) -> tuple[dict[str, Any], ModelConfig, set[str]]:
    """Parameters as our tree on the first device, the model they are of, and the source's dtypes.

    A model whose configuration ties its two matrices is another one where the files hold two that differ, as in
    transformers. The host holds one tensor at a time besides what has been placed.

    Args:
      dtype: "source" keeps each tensor's, else "float32" or "bfloat16".

    Raises:
      UserError: a tensor is missing, unknown, of another shape, not finite or of an unsupported dtype.
    """
    shapes, tied = source.shapes(), model.tie_embeddings
    both = tied and {HEAD, EMBEDDING} <= set(shapes)
    if both:
        model = dataclasses.replace(model, tie_embeddings=False)
    alias = {HEAD: EMBEDDING} if tied and not both else {}  # one matrix, under either name
    wanted = rules.pairs(model)
    rules.check_names({alias.get(name, name): None for name in shapes}, wanted, source.origin)
    for name, shape in shapes.items():
        if (pair := wanted.get(alias.get(name, name))) is not None:
            rules.check_shape(pair, shape, source.origin)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    flat: dict[str, Any] = {}
    dtypes: set[str] = set()
    for name, array in source.read_all():
        pair = wanted.get(alias.get(name, name))
        if pair is None:
            continue  # computed from the configuration: `rules.COMPUTED`
        dtypes.add(array.dtype.name)
        ours = pair.ours(array)
        if dtype != "source":
            ours = ours.astype(jnp.dtype(dtype))
        flat[pair.path] = jax.device_put(np.ascontiguousarray(ours), place)
        if progress is not None:
            progress(math.prod(pair.shape))
    if both and np.array_equal(np.asarray(flat["unembed"]).T, np.asarray(flat["embed"])):
        del flat["unembed"]
        model = dataclasses.replace(model, tie_embeddings=True)
    return rules.nested(flat), model, dtypes


def run_config(model: ModelConfig, side: Path) -> RunConfig:
    """The run configuration of a converted checkpoint; `read_config` knows that its paths are inside its folder."""
    tokenizer = f"{SIDE}/tokenizer.json" if (side / "tokenizer.json").is_file() else SIDE
    if not has_tokenizer(side) and model.vocab_size == byte_tokenizer().vocab_size:
        tokenizer = "bytes"  # a model of bytes has no files for them
    data = DataConfig(
        source="stdlib:json,email",
        tokenizer=tokenizer,
        context=min(512, model.max_positions),
    )
    evaluation = EvalConfig(length=min(64, model.max_positions), sequences=32)
    return RunConfig(attn=", ".join(model.mixers), preset="converted", steps=1, model=model, data=data, eval=evaluation)


def convert(text: str, dst: Path, *, dtype: str = "source") -> Path:
    """Convert SRC to DST and return DST.

    Raises:
      UserError: naming what is wrong; DST is then as it was.
    """
    with new_folder(dst) as partial:
        with reading(text):
            source = open_source(text)
            raw, origin = source.config(), f"{source.origin} (config.json)"
            rules.check_layers(source.shapes(), hf_config.count_layers(raw, origin), origin)
        model = hf_config.parse(raw, origin)
        (partial / SIDE).mkdir()
        source.save_side_files(partial / SIDE)  # before the weights: what is wrong with a tokenizer is soon found
        _write(source, model, partial, dtype)
    return dst


def _write(source: Source, model: ModelConfig, folder: Path, dtype: str) -> None:
    total = sum(math.prod(pair.shape) for pair in rules.pairs(model).values())
    with Progress() as bar, reading(source.origin):
        task = bar.add_task(f"reading {model.num_layers} layers", total=total)
        params, model, dtypes = read_params(source, model, dtype=dtype, progress=lambda n: bar.advance(task, n))
    cfg = run_config(model, folder / SIDE)
    write_json_atomic(folder / "config.json", cfg.to_dict())
    (folder / "metrics.jsonl").write_text('{"step": 0}\n', "utf-8")  # what a report begins with
    with Checkpoints(folder / "checkpoints", config=cfg.to_dict(), async_save=False) as checkpoints:
        checkpoints.save(0, {"params": params})
    with reading(source.origin):
        files = {path.name: dataclasses.asdict(hash_file(path)) for path in source.files()}
    write_json_atomic(
        folder / "provenance.json",
        {
            "source": source.origin,
            "kind": source.kind,
            "dtypes": sorted(dtypes),
            "kept_as": dtype,
            "layout": source.layout(),
            "notes": source.notes(),
            "files": files,
            "versions": versions(),
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.from_hf", description=__doc__)
    parser.add_argument("src", help="HuggingFace folder, .gguf file, or hub name")
    parser.add_argument("dst", type=Path, help="folder to create")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="source", help="of the kept parameters (default: the source's)"
    )
    args = parser.parse_args()
    folder = convert(args.src, args.dst, dtype=args.dtype)
    try:
        if has_tokenizer(folder / SIDE) or read_config(folder).data.tokenizer != "bytes":
            read_tokenizer(folder / SIDE)
    except UserError as error:  # the weights are there all the same
        print(f"its tokenizer cannot be used yet: {error}", file=sys.stderr)
    for note in json.loads((folder / "provenance.json").read_text("utf-8"))["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"converted: {folder}")
    return 0


if __name__ == "__main__":
    run_cli(main)
