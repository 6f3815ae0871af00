"""Both models of the harness on one tiny checkpoint: ours, and its own HuggingFace model as the oracle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from convert.from_hf import convert
from evals.harness_lm import JaxattnLM
from jaxattn.text import load
from tests.generate.checkpoints import build

CONTEXT, WINDOW = 512, 64  # the models' own, and one that most texts exceed


@dataclasses.dataclass
class Twin:
    """Both models on one checkpoint."""

    kind: str
    source: Path
    ours: JaxattnLM
    theirs: HFLM


def make_twin(style: str, folder: Path) -> Twin:
    source = folder / "hf"
    source.mkdir()
    build(style, source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 40], "top_p": 0.9}))
    loaded = load(convert(str(source), folder / "ours"))
    theirs = HFLM(pretrained=str(source), device="cpu", dtype="float32", batch_size=1, max_length=WINDOW)
    return Twin(style, source, JaxattnLM(loaded, batch_size=8, max_length=WINDOW), theirs)


def ask(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def both(twin: Twin, kind: str, requests: list[tuple[Any, ...]]) -> tuple[list[Any], list[Any]]:
    return tuple(getattr(lm, kind)([ask(kind, *r) for r in requests]) for lm in (twin.ours, twin.theirs))
