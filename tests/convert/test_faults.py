"""Malformed and hostile checkpoints: one clear sentence each, exit code 2, nothing written, little memory and time."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import from_hf, hf_config, rules
from convert.from_hf import convert
from convert.sources import MOST_SIDE_BYTES
from convert.to_hf import export
from jaxattn.errors import CheckpointError, Incomplete, UserError
from jaxattn.models import ModelConfig
from jaxattn.new_folder import new_folder
from tests.convert.gguf_models import write

MODEL = ModelConfig(
    vocab_size=31, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, max_positions=32, norm_eps=1e-6
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@functools.cache
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


def generation(**fields):
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(fields))


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
    "a file name of a megabyte in the index": (
        lambda f: index(f, **{NORM: "x" * 1_000_000 + ".safetensors"}),
        "only files of this folder",
    ),
    "a header entry of lines": (lambda f: header(f, lambda h: {**h, NORM: "a\n" * 50}), "its header entry is 'a"),
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
    "header is a list": (lambda f: header(f, lambda h: []), "(header) holds a JSON list"),
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
    "no number for the rotary base": (lambda f: config(f, rope_theta=None, rope_parameters=...), "rope_theta is None"),
    "unknown rotary scaling": (
        lambda f: config(f, rope_parameters={"rope_type": "su", "rope_theta": 1e4}),
        "rope_type 'su' is not supported",
    ),
    "a size that is text": (lambda f: config(f, hidden_size="16"), "hidden_size is '16' but must be an integer"),
    "a size of 10^30": (lambda f: config(f, hidden_size=10**30), "hidden_size is 1000000"),
    "negative layers": (lambda f: config(f, num_hidden_layers=-2), "num_hidden_layers is -2"),
    "NaN in the configuration": (lambda f: config(f, rms_norm_eps=float("nan")), "contains NaN"),
    "a mixture of experts": (lambda f: config(f, architectures=["Qwen3MoeForCausalLM"]), "mixture of experts"),
    "experts in a dense class": (lambda f: config(f, num_local_experts=8), "mixture of experts"),
    "unknown architecture": (lambda f: config(f, architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel' is not known"),
    "code of its own": (lambda f: config(f, auto_map={"AutoModel": "evil.Model"}), "never executed"),
    "quantised": (lambda f: config(f, quantization_config={"bits": 4}), "quantised weights are not read"),
    "an activation we lack": (lambda f: config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a JSON list"),
    "configuration with a BOM": (
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        "is not valid JSON",
    ),
    "configuration of 5,000 digits": (
        lambda f: (f / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"),
        "is not valid JSON",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter is not read"),
    "an end token of text": (generation(eos_token_id=["2"]), "eos_token_id is ['2'] but must be a token id"),
    "an end token of 2^31": (generation(eos_token_id=1 << 31), "eos_token_id is 2147483648 but"),
    "an end token below 0": (generation(eos_token_id=-5), "eos_token_id is -5 but"),
    "an end token that is true": (generation(eos_token_id=True), "eos_token_id is True but"),
    "a generation configuration that is a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        "generation_config.json holds a JSON list",
    ),
    "configuration nests deep": (
        lambda f: (f / "config.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"),
        "is not valid JSON",
    ),
    "a megabyte where a word belongs": (lambda f: config(f, model_type="x" * 1_000_000), "model_type 'xxx"),
    "a megabyte where a number belongs": (lambda f: config(f, rope_theta="9" * 1_000_000), "rope_theta is '999"),
    "a megabyte in a list": (lambda f: config(f, architectures=["x\n" * 500_000] * 2), "architectures is ['x"),
    "a key of a megabyte": (lambda f: config(f, **{"x" * 1_000_000 + "experts": 3}), "a mixture of experts"),
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


def test_folders_made_on_the_way_go_with_a_failed_conversion(good, tmp_path):
    truncated(good)
    (tmp_path / "there").mkdir()
    for dst in ("p1/p2/x", "there/p/x"):
        with pytest.raises(CheckpointError):
            convert(str(good), tmp_path / dst)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ["good", "there"]


def test_folders_made_on_the_way_stay_where_somebody_else_uses_them(tmp_path):
    def meanwhile():
        with new_folder(tmp_path / "p1" / "p2" / "x") as partial:
            (partial.parents[1] / "file").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        meanwhile()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "p1"]
    with new_folder(tmp_path / "p1" / "p2" / "x") as partial:
        (partial / "content").write_text("")
    assert [p.name for p in (tmp_path / "p1" / "p2" / "x").iterdir()] == ["content"]


def test_a_folder_that_cannot_be_looked_at_or_filled_is_one_sentence(tmp_path):
    with (
        pytest.raises(UserError, match=r"n cannot be written \(File name too long\)"),
        new_folder(tmp_path / ("n" * 300)),
    ):
        pass
    with pytest.raises(UserError, match=r"dst cannot be written \(Error\)"), new_folder(tmp_path / "dst"):
        raise shutil.Error([("a", "b", "why")])
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_read_is_not_a_folder_that_cannot_be_written(good, tmp_path, monkeypatch):
    (good / "tokenizer.model").write_bytes(b"x")
    read = Path.read_bytes

    def read_bytes(path):
        if path.name == "tokenizer.model":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    convert(str(good), tmp_path / "sound")
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(Incomplete, match=r"good/tokenizer\.model cannot be read \(Input/output error\)"):
        convert(str(good), tmp_path / "dst")
    with pytest.raises(Incomplete, match=r"sound/hf/tokenizer\.model cannot be read \(Input/output error\)"):
        export(tmp_path / "sound", tmp_path / "back")


def test_what_is_wrong_with_a_side_file_is_found_before_the_weights_are_read(good, tmp_path, monkeypatch):
    with open(good / "tokenizer.model", "wb") as file:
        file.truncate(MOST_SIDE_BYTES + 1)
    monkeypatch.setattr(from_hf, "read_params", None)
    with pytest.raises(UserError, match="no tokenizer is that large"):
        convert(str(good), tmp_path / "dst")


def test_a_name_that_is_nothing_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        convert(str(tmp_path / "nowhere"), tmp_path / "dst")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"^'nnn.* cannot be opened \(File name too long\)\.$"):
        convert("n" * 100_000, tmp_path / "dst")
    with pytest.raises(UserError, match=r"is no \.gguf file"):
        convert(str(tmp_path / "x.bin"), tmp_path / "dst")


@pytest.mark.parametrize("layers", [3_000_000, 2**31 - 1])
def test_more_layers_than_the_files_have_are_refused_before_anything_is_built(layers, good, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "pairs", None)
    config(good, num_hidden_layers=layers)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"lacks 'model\.layers\.2' of the {layers:,} layers"):
        convert(str(good), tmp_path / "dst")
    assert sorted(tmp_path.iterdir()) == before


def test_a_head_wider_than_memory_is_refused_before_anything_is_built(good, tmp_path):
    config(good, head_dim=2**31 - 1)
    with pytest.raises(UserError, match="heads of 2,147,483,647 dims"):
        convert(str(good), tmp_path / "dst")


def test_one_whole_file_counts_before_an_index_as_in_transformers(good, tmp_path):
    whole = (good / WEIGHTS).read_bytes()
    sharded(good)
    (good / WEIGHTS).write_bytes(whole)
    (good / INDEX).write_text("{}")
    convert(str(good), tmp_path / "dst")


def test_computed_tensors_and_a_repeated_tied_head_do_no_harm(good, tmp_path):
    weights(good, lambda t: t.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(2, np.float32)))
    convert(str(good), tmp_path / "one")
    config(good, tie_word_embeddings=True)
    weights(good, lambda t: t.__setitem__("lm_head.weight", t[EMBED]))
    convert(str(good), tmp_path / "two")


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
    raw = write(tmp_path / "good.gguf", "qwen2").read_bytes()
    (tmp_path / "bad.gguf").write_bytes(HOSTILE_GGUF[fault](raw))
    with pytest.raises(CheckpointError) as caught:
        convert(str(tmp_path / "bad.gguf"), tmp_path / "dst")
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "dst").exists()


def test_a_tensor_of_no_numbers_is_refused(tmp_path):
    """Blocks of nothing where a table of rotary factors is looked for, which is read before the shapes are compared."""
    pytest.importorskip("gguf")
    raw = write(tmp_path / "x.gguf", "llama").read_bytes().replace(b"token_embd.weight", b"rope_freqs.weight")
    at = after(raw, b"rope_freqs.weight")
    (tmp_path / "x.gguf").write_bytes(put(put(raw, at + 4, 0), at + 20, 8, "<I"))
    with pytest.raises(CheckpointError, match=r"tensor 'rope_freqs\.weight' has dimensions \[0, [0-9]+\]"):
        convert(str(tmp_path / "x.gguf"), tmp_path / "dst")


def test_the_sound_gguf_file_is_accepted(tmp_path):
    pytest.importorskip("gguf")
    convert(str(write(tmp_path / "good.gguf", "qwen2")), tmp_path / "dst")


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
