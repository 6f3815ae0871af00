"""Malformed and hostile checkpoints: one clear sentence each, exit code 2, nothing written, little memory and time."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hf_config, rules
from convert.from_hf import convert
from convert.gguf_files import GgufFile
from jaxattn.errors import CheckpointError, Unsupported, UserError
from jaxattn.models import ModelConfig
from train.load import read_config

MODEL = ModelConfig(
    vocab_size=31, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, max_positions=32, norm_eps=1e-6
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(p.their_shape).astype(np.float32) for n, p in rules.pairs(MODEL).items()}


@pytest.fixture
def good(tmp_path):
    """A sound checkpoint of one file."""
    folder = tmp_path / "good"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config.write(MODEL, "float32")))
    save_file(tensors(), folder / WEIGHTS)
    return folder


def sharded(folder: Path) -> dict[str, str]:
    """The same in two files with an index."""
    names = sorted(tensors())
    (folder / WEIGHTS).unlink()
    layout = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(layout.values()):
        save_file({n: tensors()[n] for n in names if layout[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": layout}))
    return layout


def config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        raw.pop(key, None) if value is ... else raw.__setitem__(key, value)
    (folder / "config.json").write_text(json.dumps(raw))


def weights(folder: Path, change) -> None:
    """Rewrite the tensors after `change(dict)`."""
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS)


def header(folder: Path, change) -> None:
    """Rewrite the header of the one file; `change` gets the dict and returns an object or bytes."""
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    new = change(json.loads(raw[8 : 8 + length]))
    body = new if isinstance(new, bytes) else json.dumps(new).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(body)) + body + raw[8 + length :])


def edited(name: str, **fields):
    return lambda h: {**h, name: {**h[name], **fields}}


def twice(h):
    text = json.dumps(h)
    entry = json.dumps(h[NORM])
    return (text[:-1] + f', "{NORM}": {entry}}}').encode()


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
K = "model.layers.1.self_attn.k_proj.weight"


def replaced(folder: Path, raw: bytes) -> None:
    (folder / WEIGHTS).write_bytes(raw)


def index(folder: Path, **moves) -> None:
    layout = sharded(folder)
    layout.update(moves)
    (folder / INDEX).write_text(json.dumps({"weight_map": layout}))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def linked_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


def config_linked_out(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated(folder: Path) -> None:
    replaced(folder, (folder / WEIGHTS).read_bytes()[:-9])


def set_(name, value):
    def change(found):
        found[name] = value(found[name])

    return lambda f: weights(f, change)


FAULTS = {
    # files
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "has neither model.safetensors nor"),
    "only pickled weights": (pickled, "pytorch_model.bin, a format that can run code"),
    "missing shard": (missing_shard, "model-00002-of-00002.safetensors is missing"),
    "weights link out": (linked_out, "leads out of"),
    "config links out": (config_linked_out, "leads out of"),
    # index
    "absolute path in index": (
        lambda f: index(f, **{NORM: "/etc/passwd"}),
        "places 'model.norm.weight' in '/etc/passwd'",
    ),
    "path traversal in index": (lambda f: index(f, **{NORM: "../x.safetensors"}), "only files of this folder"),
    "index names an absent tensor": (
        lambda f: index(f, extra="model-00001-of-00002.safetensors"),
        "tensor 'extra' is in model.safetensors.index.json but not in",
    ),
    "index names the other file": (
        lambda f: index(f, **{sorted(tensors())[0]: "model-00002-of-00002.safetensors"}),
        "index.json says 'model-00002",
    ),
    "index without a map": (lambda f: (sharded(f), (f / INDEX).write_text("{}")), "weight_map must be an object"),
    # headers
    "empty file": (lambda f: replaced(f, b""), "its header claims"),
    "header of 2^63 bytes": (
        lambda f: replaced(f, struct.pack("<Q", 1 << 63) + (f / WEIGHTS).read_bytes()[8:]),
        "header claims 9,223,372,036,854,775,808 bytes",
    ),
    "header is no JSON": (lambda f: header(f, lambda h: b"{not json"), "is not valid JSON"),
    "header is a list": (lambda f: header(f, lambda h: []), "its header is a list"),
    "header nests a million deep": (lambda f: header(f, lambda h: b"[" * 1_000_000), "is not valid JSON"),
    "header is no UTF-8": (lambda f: header(f, lambda h: b'{"\xff\xfe": 1}'), "is not UTF-8"),
    "a tensor twice": (lambda f: header(f, twice), "names 'model.norm.weight' twice"),
    "truncated weights": (truncated, "bytes of weights but its header describes"),
    "bytes behind the weights": (lambda f: replaced(f, (f / WEIGHTS).read_bytes() + b"xx"), "but its header describes"),
    "offsets overlap": (lambda f: header(f, edited(NORM, data_offsets=[0, 64])), "a gap or an overlap"),
    "offsets are negative": (lambda f: header(f, edited(NORM, data_offsets=[-64, 0])), "its header entry is"),
    "offsets lie about the shape": (lambda f: header(f, edited(NORM, shape=[17])), "bytes for shape"),
    "a shape of 2^60": (lambda f: header(f, edited(NORM, shape=[1 << 60])), "its header entry is"),
    "a dtype of its own": (lambda f: header(f, edited(NORM, dtype="F8_E4M3")), "has dtype F8_E4M3"),
    "a header entry that is no object": (lambda f: header(f, lambda h: {**h, NORM: 5}), "its header entry is 5"),
    # tensors
    "NaN weights": (set_(K, lambda x: np.where(x > 1, np.nan, x)), "holds NaN or infinite numbers"),
    "infinite weights": (set_(NORM, lambda x: x * np.float32("inf")), "holds NaN or infinite numbers"),
    "int weights": (set_(K, lambda x: x.astype(np.int32)), "has dtype I32"),
    "wrong shape": (set_(K, lambda x: x.T.copy()), "has shape [16, 8] but the configuration asks for [8, 16]"),
    "wrong vocabulary": (
        set_(EMBED, lambda x: x[:-1].copy()),
        "has shape [30, 16] but the configuration asks for [31, 16]",
    ),
    "a tensor too few": (lambda f: weights(f, lambda t: t.pop(K)), f"lacks '{K}'"),
    "a tensor too many": (lambda f: weights(f, lambda t: t.__setitem__("lora.A", t[NORM])), "has 'lora.A', which"),
    # configuration
    "one layer more": (lambda f: config(f, num_hidden_layers=3), "lacks 'model.layers.2"),
    "one layer fewer": (lambda f: config(f, num_hidden_layers=1), "has 'model.layers.1"),
    "kv heads do not divide": (lambda f: config(f, num_key_value_heads=3), "num_key_value_heads 3 does not divide"),
    "no rotary base": (lambda f: config(f, rope_theta=..., rope_parameters=...), "no rotary base"),
    "unknown rotary scaling": (
        lambda f: config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "rope scaling 'longrope' is not supported",
    ),
    "a size that is text": (lambda f: config(f, hidden_size="16"), "hidden_size is '16' but must be a int"),
    "a size of 10^30": (lambda f: config(f, hidden_size=10**30), "hidden_size is 1000000"),
    "negative layers": (lambda f: config(f, num_hidden_layers=-2), "num_hidden_layers is -2"),
    "NaN in the configuration": (lambda f: config(f, rms_norm_eps=float("nan")), "contains NaN"),
    "a mixture of experts": (lambda f: config(f, architectures=["Qwen3MoeForCausalLM"]), "mixture of experts"),
    "experts in a dense class": (lambda f: config(f, num_local_experts=8), "mixture of experts"),
    "unknown architecture": (lambda f: config(f, architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel' is not known"),
    "code of its own": (lambda f: config(f, auto_map={"AutoModel": "evil.Model"}), "never executed"),
    "quantised": (lambda f: config(f, quantization_config={"bits": 4}), "quantised weights are not read"),
    "an activation we lack": (lambda f: config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "configuration with a BOM": (
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        "is not valid JSON",
    ),
    "configuration of 5,000 digits": (
        lambda f: (f / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"),
        "is not valid JSON",
    ),
    "a tied head that is another matrix": (lambda f: config(f, tie_word_embeddings=True), "is not the embedding"),
}


def test_the_sound_checkpoint_is_accepted(good, tmp_path):
    convert(str(good), tmp_path / "dst")
    sharded(good)
    convert(str(good), tmp_path / "dst2")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_malformed_checkpoint_is_refused_and_leaves_nothing(fault, good, tmp_path):
    spoil, message = FAULTS[fault]
    spoil(good)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        convert(str(good), tmp_path / "dst")
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert len(text) < 600
    assert sorted(tmp_path.iterdir()) == before, "nothing may be left behind"


def test_the_command_ends_with_code_two_and_one_sentence(good, tmp_path):
    truncated(good)
    done = subprocess.run(
        [sys.executable, "-m", "convert.from_hf", str(good), str(tmp_path / "dst")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "dst").exists()


def test_a_folder_that_exists_is_not_touched(good, tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(str(good), tmp_path / "dst")


def test_a_name_that_is_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        convert(str(tmp_path / "nowhere"), tmp_path / "dst")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"is no \.gguf file"):
        convert(str(tmp_path / "x.bin"), tmp_path / "dst")


def test_computed_tensors_and_a_repeated_tied_head_do_no_harm(good, tmp_path):
    weights(good, lambda t: t.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(2, np.float32)))
    convert(str(good), tmp_path / "one")
    config(good, tie_word_embeddings=True)
    weights(good, lambda t: t.__setitem__("lm_head.weight", t[EMBED]))
    convert(str(good), tmp_path / "two")


def gguf_file(path: Path, rope: np.ndarray | None = None) -> bytes:
    """A tiny sound GGUF file of the model's shapes, perhaps with a table of rotary divisors."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*(chr(97 + i) for i in range(25)), "ab"])
    writer.add_token_merges(["a b"])
    shapes = {
        "token_embd.weight": (26, 16), "output_norm.weight": (16,), "blk.0.attn_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (16,), "blk.0.attn_q.weight": (16, 16), "blk.0.attn_q.bias": (16,),
        "blk.0.attn_k.weight": (8, 16), "blk.0.attn_k.bias": (8,), "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_v.bias": (8,), "blk.0.attn_output.weight": (16, 16), "blk.0.ffn_gate.weight": (24, 16),
        "blk.0.ffn_up.weight": (24, 16), "blk.0.ffn_down.weight": (16, 24),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    if rope is not None:
        writer.add_tensor("rope_freqs.weight", rope)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def put(raw: bytes, at: int, value: int, form: str = "<Q") -> bytes:
    packed = struct.pack(form, value)
    return raw[:at] + packed + raw[at + len(packed) :]


def after(raw: bytes, text: bytes) -> int:
    return raw.index(text) + len(text)


HOSTILE_GGUF = {
    "another magic": lambda r: b"GGML" + r[4:],
    "another version": lambda r: put(r, 4, 99, "<I"),
    "2^40 tensors": lambda r: put(r, 8, 1 << 40),
    "one tensor more": lambda r: put(r, 8, struct.unpack("<Q", r[8:16])[0] + 1),
    "2^40 metadata entries": lambda r: put(r, 16, 1 << 40),
    "a key of 2^60 bytes": lambda r: put(r, 24, 1 << 60),
    "a value of kind 77": lambda r: put(r, after(r, b"general.architecture"), 77, "<I"),
    "2^50 tokens": lambda r: put(r, after(r, b"tokenizer.ggml.tokens") + 8, 1 << 50),
    "a tensor of 2^60 rows": lambda r: put(r, after(r, b"token_embd.weight") + 4, 1 << 60),
    "a tensor of 9 dimensions": lambda r: put(r, after(r, b"token_embd.weight"), 9, "<I"),
    "an unknown quantisation": lambda r: put(r, after(r, b"token_embd.weight") + 20, 9999, "<I"),
    "an offset beyond the file": lambda r: put(r, after(r, b"token_embd.weight") + 24, 1 << 50),
    "cut in the header": lambda r: r[:100],
    "cut in the weights": lambda r: r[:-600],
    "empty": lambda r: b"",
}


@pytest.mark.parametrize("fault", HOSTILE_GGUF)
def test_a_hostile_gguf_file_is_refused(fault, tmp_path):
    pytest.importorskip("gguf")
    raw = gguf_file(tmp_path / "good.gguf")
    (tmp_path / "bad.gguf").write_bytes(HOSTILE_GGUF[fault](raw))
    with pytest.raises(CheckpointError) as caught:
        convert(str(tmp_path / "bad.gguf"), tmp_path / "dst")
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "dst").exists()


def test_the_sound_gguf_file_is_accepted(tmp_path):
    pytest.importorskip("gguf")
    gguf_file(tmp_path / "good.gguf")
    convert(str(tmp_path / "good.gguf"), tmp_path / "dst")


def test_the_rotary_table_of_llama_3_becomes_its_scaling(tmp_path):
    """The divisors are those of transformers' own frequencies; `_llama3` because a head of 128 dims is no tiny file."""
    pytest.importorskip("gguf")
    pytest.importorskip("torch", reason="transformers computes the frequencies with it")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    oracle = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters={"rope_theta": 5e5, **rope})
    theirs = LlamaRotaryEmbedding(oracle).inv_freq.numpy().astype(np.float64)
    table = (5e5 ** (-np.arange(64) / 64) / theirs).astype(np.float32)
    assert {1.0, 8.0} < set(np.round(table, 4).tolist())  # fast pairs, slow ones, and some between
    gguf_file(tmp_path / "table.gguf", table)
    assert GgufFile(tmp_path / "table.gguf")._llama3(128, 5e5) == rope


def test_a_file_with_the_table_converts(tmp_path):
    """A head of 4 turns so fast at base 1e4 that every divisor is 1."""
    pytest.importorskip("gguf")
    gguf_file(tmp_path / "good.gguf", np.ones(2, np.float32))
    convert(str(tmp_path / "good.gguf"), tmp_path / "dst")
    scaling = read_config(tmp_path / "dst").model.rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_length) == ("llama3", 1.0, 8192)


@pytest.mark.parametrize("table", [[1.0, 7.0], [1.0, np.nan], [1.0], [0.5, 0.5]])
def test_another_rotary_table_is_refused(table, tmp_path):
    pytest.importorskip("gguf")
    gguf_file(tmp_path / "bad.gguf", np.asarray(table, np.float32))
    with pytest.raises(Unsupported, match=r"not Llama 3's"):
        convert(str(tmp_path / "bad.gguf"), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("fault", ["header of 2^63 bytes", "header nests a million deep", "a shape of 2^60"])
def test_a_lying_header_costs_little_time_and_memory(fault, good):
    """In a process of its own with little more memory than it needs to start."""
    FAULTS[fault][0](good)
    code = (
        "import sys, time, resource; from pathlib import Path; from convert.safetensors_files import entries\n"
        "from jaxattn.errors import UserError\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (200 << 20),) * 2)\n"
        "start = time.process_time()\n"
        "try:\n    entries(Path(sys.argv[1]))\nexcept UserError:\n    print(time.process_time() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(good)], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-500:]
    assert float(done.stdout) < 1
