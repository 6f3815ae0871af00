"""Conversion streams: beside the model, the host holds about one shard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import hf_config, rules
from convert.safetensors_files import INDEX

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 3
# Peaks are those of a process that has converted something small before, so that imports are not counted.
CONVERT = """
import sys
from pathlib import Path
from convert.from_hf import convert
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
small, large, out = map(Path, sys.argv[1:])
convert(str(small), out / "small")
before = peak()
convert(str(large), out / "large")
print(before, peak())
"""


def source(folder: Path, width: int, layers: int) -> tuple[int, int]:
    """A random Llama in `SHARDS` files; bytes of the model and of the largest file's tensors."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": width,
        "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    pairs, rng = rules.pairs(hf_config.parse(config)), np.random.default_rng(0)
    sizes, where = [], {}
    for i, names in enumerate(np.array_split(np.asarray(list(pairs), object), SHARDS), 1):
        file = f"model-{i:05d}-of-{SHARDS:05d}.safetensors"
        shard = {n: pairs[n].theirs(rng.standard_normal(pairs[n].shape, dtype=np.float32)) for n in names}
        save_file({name: np.ascontiguousarray(x) for name, x in shard.items()}, folder / file)
        sizes.append(sum(x.nbytes for x in shard.values()))
        where |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": where}))
    return sum(sizes), max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_the_model_and_a_shard(tmp_path):
    source(tmp_path / "small", 64, 1)
    model, shard = source(tmp_path / "large", 768, 9)
    words = [sys.executable, "-c", CONVERT, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split()[-2:])
    assert model > 250e6
    assert (peak - before) * 1024 < model + 1.3 * shard, (before, peak, model, shard)
