"""`convert.verify` says equal for an honest checkpoint, and shows the layer where another one goes wrong."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from convert.from_hf import convert
from convert.sources import Folder
from convert.verify import Agreement, Oracle, verify
from convert.verify_tokens import compare as compare_tokens
from jaxattn.runs.checkpoint import Checkpoints
from jaxattn.runs.load import load_params, read_config
from tests.convert.families import build
from tests.generate import checkpoints
from tests.in_process import called

pytest.importorskip("torch", reason="the oracle")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    build("qwen3", folder / "hf")
    return folder / "hf", convert(str(folder / "hf"), folder / "ours")


def compare(src, dst):
    console = Console(file=io.StringIO(), width=140)
    same = verify(str(src), dst, prompts=[], tolerance=1e-3, console=console)
    return same, console.file.getvalue()


def test_an_honest_checkpoint_is_equal(twin):
    same, text = compare(*twin)
    assert same
    assert "equal: no logit differs" in text
    assert "random tokens 7" in text


def test_a_changed_layer_is_found(twin, tmp_path):
    src, dst = twin
    cfg = read_config(dst)
    params, _ = load_params(dst, cfg)
    params["layer_1"]["mlp"]["down"]["kernel"] *= 1.5
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_bytes((dst / "config.json").read_bytes())
    with Checkpoints(tmp_path / "bad" / "checkpoints", config=cfg.to_dict()) as checkpoints:
        checkpoints.save(0, {"params": jax.tree.map(np.asarray, params)})
    same, text = compare(src, tmp_path / "bad")
    assert not same
    gaps = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃ ").split("│")]
        if cells[0].startswith(("embedding", "layer")) and len(cells) == 3:
            gaps[cells[0]] = float(cells[2])
    assert gaps["embedding"] == 0
    assert gaps["layer 0"] < 1e-5 < 1e-2 < gaps["layer 1"]


def test_a_logit_that_is_no_number_is_the_largest_difference(twin, monkeypatch):
    """Wherever it comes among the prompts."""
    logits, calls = Oracle.logits, []

    def second_is_none(self, ids):
        calls.append(ids)
        return logits(self, ids) * (np.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(Oracle, "logits", second_is_none)
    same, text = compare(*twin)
    assert not same
    assert "different: logits differ by up to nan" in text


def test_the_command_ends_with_zero_when_equal(twin):
    command = [sys.executable, "-m", "convert.verify", *map(str, twin)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = called("convert.verify", *twin, "--prompt", "x")
    assert done.returncode == 2
    assert "needs a tokenizer" in done.stderr


def test_agreement_of_logits_by_hand():
    logits = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]], np.float32)
    same = Agreement.of(logits, logits)
    assert (same.max_abs, same.top1, same.top5) == (0, 1, 1)
    assert abs(same.kl) < 1e-7
    other = logits.copy()
    other[0, 6], other[0, 1] = 1.0, 6.5
    far = Agreement.of(logits, other)
    assert (far.max_abs, far.top1, far.top5) == (5.5, 0.5, 0.5)
    p, q = np.exp(logits[0]) / np.exp(logits[0]).sum(), np.exp(other[0]) / np.exp(other[0]).sum()
    assert far.kl == pytest.approx(float((p * np.log(p / q)).sum()) / 2, rel=1e-5)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    (folder / "hf").mkdir()
    checkpoints.build("llama3", folder / "hf")
    return folder / "hf", convert(str(folder / "hf"), folder / "ours")


def test_a_verdict_speaks_of_tokens_too(talker, tmp_path):
    src, dst = talker
    console = Console(file=io.StringIO(), width=300)
    assert verify(str(src), dst, prompts=["hello"], tolerance=1e-3, console=console)
    assert "tokens: 5 texts and 2 chats equal those of transformers" in console.file.getvalue()
    bad = shutil.copytree(dst, tmp_path / "bad")
    (bad / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    console = Console(file=io.StringIO(), width=300)
    assert not verify(str(src), bad, prompts=["hello"], tolerance=1e-3, console=console)
    assert "tokens differ on a chat of 1" in console.file.getvalue()
    assert "equal: no logit differs" in console.file.getvalue()


def _edit(path, change):
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


FAULTS = {
    "no start token": ("tokenizer.json", lambda raw: raw.update(post_processor=None), "transformers has [601, "),
    "merges lost": ("tokenizer.json", lambda raw: raw["model"].update(merges=raw["model"]["merges"][:50]), "'hello"),
    "no word kept whole": ("tokenizer.json", lambda raw: raw["model"].update(ignore_merges=False), "' xylophones'"),
    "no tokenizer": ("tokenizer.json", lambda raw: raw.clear(), "transformers reads the source's tokenizer, but"),
    "a special token less": (
        "tokenizer_config.json",
        lambda raw: raw.update(bos_token=None),
        "a chat of 1: transformers has '<|begin",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_tokenizer_is_seen(talker, tmp_path, name):
    file, change, words = FAULTS[name]
    side = shutil.copytree(talker[1] / "hf", tmp_path / "hf")
    assert compare_tokens(Folder(talker[0]), side, ["hello World", " xylophones"]).same
    _edit(side / file, change)
    found = compare_tokens(Folder(talker[0]), side, ["hello World", " xylophones"])
    assert not found.same
    assert words in found.line
    assert "\n" not in found.line
    assert len(found.line) < 700


def test_a_source_without_a_tokenizer_has_nothing_to_compare(twin):
    found = compare_tokens(Folder(twin[0]), twin[1] / "hf", ["x"])
    assert found.same
    assert "nothing to compare" in found.line
