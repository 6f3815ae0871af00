"""GGUF files as llama.cpp's loader reads them: every key against logits that llama.cpp gave (`record_llama_cpp`)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from convert import hf_config, rules
from convert.from_hf import convert
from convert.gguf_files import GgufFile, readable
from convert.sources import Gguf
from convert.to_hf import export
from jaxattn.errors import UserError
from jaxattn.models import ModelConfig
from jaxattn.rope import RopeScaling, frequencies
from tests.convert.gguf_models import CASES, DIM, FIELDS, IDS, PLACES, SHOWN, TABLE, VOCAB, WIDTH, write
from tests.convert.numpy_decoder import logits as numpy_logits

gguf = pytest.importorskip("gguf")
RECORDED = json.loads(Path(__file__).with_name("llama_cpp.json").read_text("utf-8"))
# What llama.cpp computes and is refused here, by the words of the refusal.
REFUSED = {"not causal": "attention.causal", "longrope": "rope.scaling.type", "an output bias": "output.bias"}


def ours(path: Path) -> tuple[ModelConfig, np.ndarray]:
    file = GgufFile(path)
    model = hf_config.parse(file.config(), str(path))
    wanted = rules.pairs(model)
    rules.check_layers(file.shapes(), model.num_layers, str(path))
    rules.check_names(file.shapes(), wanted, str(path))
    for name, shape in file.shapes().items():
        rules.check_shape(wanted[name], shape, str(path))
    params = rules.nested({wanted[name].path: wanted[name].ours(array) for name, array in file.read_all()})
    return model, numpy_logits(model, params, IDS)


@pytest.mark.smoke
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_key_means_what_it_means_in_llama_cpp(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "parameter_shapes", _cached(rules.parameter_shapes))
    wrong, agree, refused = [], 0, 0
    plain = np.array(RECORDED[f"{arch}: plain"])
    for (of, name), case in CASES.items():
        if of != arch:
            continue
        theirs = RECORDED[f"{arch}: {name}"]
        path = write(tmp_path / "case.gguf", arch, **case)
        try:
            found = ours(path)[1][list(PLACES), :SHOWN]
        except UserError as error:
            text, refused = str(error), refused + 1
            if not (isinstance(theirs, str) or REFUSED.get(name, "?") in text) or "\n" in text or len(text) > 600:
                wrong.append(f"{name}: refused: {text}")
            continue
        if isinstance(theirs, str):
            wrong.append(f"{name}: read, but llama.cpp {theirs} it")
        elif np.abs(found - theirs).max() > 1e-3:
            wrong.append(
                f"{name}: differs by {np.abs(found - theirs).max():.3g} (plain: {np.abs(found - plain).max():.3g})"
            )
        agree += 1
    print(f"\n{arch}: {agree} settings agree with llama.cpp to 1e-3, {refused} are refused")
    assert not wrong, "\n".join(wrong)


def _cached(shapes):
    """The rotary part of a model has no parameters."""
    import dataclasses

    known = {}

    def find(model):
        same = dataclasses.replace(model, rope_base=2.0, rope_scaling=RopeScaling(), max_positions=1, norm_eps=1.0)
        if same not in known:
            known[same] = shapes(same)
        return known[same]

    return find


def test_what_llama_cpp_passes_over_is_said(tmp_path):
    fields = {"attention.sliding_window": 5, "logit_scale": 0.5, "rope.scaling.yarn_beta_fast": 4.0}
    notes = " ".join(GgufFile(write(tmp_path / "x.gguf", fields=fields)).notes())
    assert all(f"llama.{key}" in notes for key in fields)
    neutral = {"rope.scaling.yarn_beta_fast": 32.0, "attention.sliding_window": 0}
    assert GgufFile(write(tmp_path / "x.gguf", fields=neutral)).notes() == []


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "none"),
        ({"rope.scale_linear": 4.0}, "linear"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
        ({"rope.scaling.attn_factor": 0.5}, "longrope"),
    ],
)
def test_scalings_keep_their_names_where_huggingface_has_one(fields, kind, tmp_path):
    assert hf_config.parse(GgufFile(write(tmp_path / "x.gguf", fields=fields)).config()).rope_scaling.kind == kind


def test_the_rotary_table_of_llama_3_is_recognised(tmp_path):
    """The divisors are those of transformers' own frequencies, in heads of 128 dims, where all kinds of pairs occur."""
    pytest.importorskip("torch", reason="transformers computes the frequencies with it")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    oracle = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters={"rope_theta": 5e5, **rope})
    theirs = LlamaRotaryEmbedding(oracle).inv_freq.numpy().astype(np.float64)
    table = (5e5 ** (-np.arange(64) / 64) / theirs).astype(np.float32)
    assert {1.0, 8.0} < set(np.round(table, 4).tolist())  # fast pairs, slow ones, and some between
    fields = {"attention.key_length": 128, "attention.value_length": 128, "rope.freq_base": 5e5}
    path = write(tmp_path / "x.gguf", fields=fields, dim=128, more={"rope_freqs.weight": table})
    found = GgufFile(path).config()["rope_parameters"]
    assert found == {"rope_theta": 5e5, **rope}
    assert hf_config.parse(GgufFile(path).config()).rope_scaling == RopeScaling(
        "llama3", 8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


@pytest.mark.parametrize("table", [[1.0, np.nan, 1, 1], [1.0], [1.0, 0, 1, 1], [-1.0, 1, 1, 1]])
def test_a_table_that_is_no_table_is_refused(table, tmp_path):
    path = write(tmp_path / "x.gguf", more={"rope_freqs.weight": np.asarray(table, np.float32)})
    with pytest.raises(UserError, match=r"rope_freqs\.weight is"):
        convert(str(path), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_table_of_ones_own_is_kept_through_export(tmp_path):
    """HuggingFace's longrope gives every pair its own divisor, so transformers computes the same."""
    torch = pytest.importorskip("torch", reason="the oracle")
    import transformers

    path = write(tmp_path / "x.gguf", fields={"rope.scaling.attn_factor": 0.5}, more={"rope_freqs.weight": TABLE})
    convert(str(path), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(IDS[None])).logits[0].numpy()[list(PLACES), :SHOWN]
    np.testing.assert_allclose(theirs, RECORDED["llama: rope_freqs with attn_factor"], atol=1e-3)


def _random_blocks(kind, rows: int, width: int) -> np.ndarray:
    """Bytes of a quantised tensor whose scales are ordinary numbers, [rows, bytes of a row]."""
    from gguf.constants import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    if kind.name in ("F32", "F16", "BF16"):
        return gguf.quants.quantize(rng.standard_normal((rows, width)).astype(np.float32), kind)
    # 0x2B: no byte of a scale is then a NaN or infinite, in f16 (0x2B2B is 0.056), f32 or the 8 bits of MX
    raw = rng.integers(0, 256, (rows, width // block * size)).astype(np.uint8)
    candidates = (raw, raw & 0x3B, np.full_like(raw, 0x2B) ^ (raw & 0x44))
    for candidate in candidates:
        with np.errstate(all="ignore"):
            if np.isfinite(gguf.quants.dequantize(candidate, kind)).all():
                return candidate
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", sorted(readable(), key=lambda kind: kind.value), ids=lambda kind: kind.name)
def test_every_quantisation_that_gguf_can_unpack_is_read_to_the_bit(kind, tmp_path):
    from gguf.constants import GGML_QUANT_SIZES

    width = max(GGML_QUANT_SIZES[kind][0], 32)
    raw = _random_blocks(kind, 3, width)
    wanted = np.asarray(gguf.quants.dequantize(raw, kind), np.float32).reshape(3, width)
    assert np.abs(wanted).max() > 0
    path = write(tmp_path / "x.gguf", more={"blk.0.odd.weight": (raw, kind) if raw.dtype == np.uint8 else raw})
    file = GgufFile(path)
    assert file.tensors["blk.0.odd.weight"].shape == (3, width)
    np.testing.assert_array_equal(file.values("blk.0.odd.weight"), wanted)


def test_q5_0_and_q5_1_are_among_them():
    assert {"Q5_0", "Q5_1", "Q4_K", "IQ4_XS", "MXFP4"} <= {kind.name for kind in readable()}


@pytest.mark.parametrize("name", ["Q8_1", "I32", "F64"])
def test_other_types_are_refused_by_name(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    raw = np.zeros((WIDTH, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = write(tmp_path / "x.gguf", more={"blk.0.attn_output.weight": (raw, kind)})
    with pytest.raises(UserError, match=f"attn_output.weight' of .* is {name}; only"):
        GgufFile(path)


WRONG_TYPES = {
    "attention.head_count": [0, "4", 4.0, True, [4, 4, 4], [4, 2], [0, 0]],
    "attention.head_count_kv": ["2", 0, 3],
    "embedding_length": ["16", 0, [16]],
    "block_count": ["2", 0, True],
    "feed_forward_length": ["48", 0],
    "context_length": ["64", 0, 2.5],
    "attention.layer_norm_rms_epsilon": ["abc", 0.0, -1.0, float("nan"), float("inf"), True],
    "rope.freq_base": ["1e4", 0.0, -1.0, float("inf")],
    "rope.dimension_count": ["4", 0, 4, 16],
    "attention.key_length": ["8", 0],
    "attention.value_length": ["8", 4],
    "rope.scaling.type": [3, "bogus"],
    "rope.scaling.factor": ["4", -2.0, float("nan")],
    "rope.scale_linear": ["4", -2.0],
    "rope.scaling.attn_factor": ["1", 0.0, -1.0, float("inf")],
    "rope.scaling.original_context_length": ["16", 2.5],
    "expert_count": ["4", 4, [4]],
    "attention.causal": ["no", 0],
}
WRONG_WHOLE = {
    "tokenizer.ggml.bos_token_id": ["x", [1, 2], True, 1.5],
    "tokenizer.ggml.eos_token_id": ["x", [1, 2], True],
    "general.alignment": [3, 0, "32"],
    "split.count": ["2", 2],
}


@pytest.mark.smoke
def test_values_of_the_wrong_kind_are_one_sentence_that_names_the_key(tmp_path):
    cases = [({"fields": {key: value}}, key) for key, values in WRONG_TYPES.items() for value in values]
    cases += [({"whole": {key: value}}, key) for key, values in WRONG_WHOLE.items() for value in values]
    wrong = []
    for case, key in cases:
        path = tmp_path / "x.gguf"
        write(path, **case)
        with pytest.raises(UserError) as caught:
            convert(str(path), tmp_path / "dst")
        text = str(caught.value)
        named = key.split(".")[-1].removesuffix("_count_kv").removesuffix("_count") in text
        if not (named or ("split" in key and "parts" in text)) or "\n" in text or len(text) > 600:
            wrong.append(f"{case}: {text}")
        assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"], "nothing may be left behind"
    assert not wrong, "\n".join(wrong)


def test_a_part_of_a_split_file_says_how_to_join_them(tmp_path):
    path = write(tmp_path / "x-00001-of-00002.gguf", whole={"split.no": 0, "split.count": 2})
    with pytest.raises(UserError, match="one of 2 parts; join them"):
        convert(str(path), tmp_path / "dst")


def test_tokens_and_rows_of_the_embedding_must_be_as_many(tmp_path):
    path = write(tmp_path / "x.gguf", more={"token_embd.weight": np.ones((VOCAB - 1, WIDTH), np.float32)})
    with pytest.raises(UserError, match="names 40 tokens but its embedding has 39 rows"):
        convert(str(path), tmp_path / "dst")


def _header(path: Path, *entries: bytes) -> Path:
    """A file of nothing but a header with these metadata entries."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))
    return path


def _array(key: bytes, kind: int, count: int, raw: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, kind, count) + raw


MANY = 1 << 24
HUGE = {
    "16M bytes": lambda: _array(b"x", 0, MANY, bytes(MANY)),
    "1M empty strings": lambda: _array(b"x", 8, MANY // 16, bytes(MANY)),
    "2M tokens of no length": lambda: _array(b"tokenizer.ggml.tokens", 8, MANY // 8, bytes(MANY)),
    "more strings than there is room for": lambda: _array(b"x", 8, MANY, bytes(MANY)),
    "an array of arrays": lambda: _array(b"x", 9, 4, bytes(64)),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_array_costs_little_and_is_refused_from_the_header(name, tmp_path):
    """No array is copied or made a list of."""
    import tracemalloc

    path = _header(tmp_path / "x.gguf", HUGE[name]())
    readable()
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        convert(str(path), tmp_path / "dst")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 600
    assert peak < 20e6
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_file_that_asks_for_more_layers_than_it_has_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "pairs", None)
    with pytest.raises(UserError, match=r"lacks 'model\.layers\.2' of the 3,000,000 layers"):
        convert(str(write(tmp_path / "x.gguf", fields={"block_count": 3_000_000})), tmp_path / "dst")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_metadata_are_those_that_the_package_reads(tmp_path):
    path = write(tmp_path / "x.gguf", "qwen2", {"rope.scaling.factor": 2.5}, whole={"a.list": [1.5, 2.5], "b": True})
    reader = gguf.GGUFReader(path)
    ours, theirs = GgufFile(path).fields, {k: v.contents() for k, v in reader.fields.items() if "." in k or k == "b"}
    assert {k: ours[k] for k in theirs if not k.startswith("GGUF.")} == {
        k: v for k, v in theirs.items() if not k.startswith("GGUF.")
    }
    source = Gguf(path)
    for tensor in reader.tensors:
        assert source.opened.tensors[tensor.name].shape == tuple(int(n) for n in tensor.shape[::-1])
        np.testing.assert_array_equal(source.opened.values(tensor.name), tensor.data)


def test_yarn_s_ramp_is_that_of_llama_cpp_by_hand():
    """f64: D = 8, base 100, from 64 positions, betas 32 and 1: pairs -0.99 and 2.02 rounded outwards, 0 and 3."""
    pair = lambda beta: 8 * np.log(64 / (beta * 2 * np.pi)) / (2 * np.log(100))
    assert np.floor(pair(32)) == -1
    assert np.ceil(pair(1)) == 3
    keep = 1 - np.array([0, 1, 2, 3]) / 3
    plain = 100.0 ** (-np.arange(4) / 4)
    scaling = RopeScaling("yarn", 4.0, original_length=64)
    np.testing.assert_allclose(frequencies(DIM, 100.0, scaling=scaling), plain * (keep + (1 - keep) / 4), rtol=1e-12)
    assert FIELDS["context_length"] == 64
