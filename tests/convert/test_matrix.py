"""Every key of a config.json that transformers reads, at a value that is not the default, alone and with those it
contradicts, in every family: our logits are transformers', or the key is refused by name.

`python -m pytest tests/convert/test_matrix.py -s` prints how many cells agree and how many are refused.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import hf_config, rules
from convert.from_hf import read_params
from convert.hf_families import REFUSED as REFUSED_KEYS
from convert.sources import Folder
from jaxattn.errors import UserError
from jaxattn.nn import Decoder
from jaxattn.rope import RopeScaling
from tests.convert.numpy_decoder import logits as numpy_logits

torch = pytest.importorskip("torch", reason="the oracle")
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
QWEN = ("Qwen2", "Qwen3")
IDS = np.arange(24) * 7 % 97
BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False, "rope_theta": 100.0, "sliding_window": None, "initializer_range": 0.3,
}  # fmt: skip
GONE: Any = ...  # the key is not there

scaled = lambda kind, **more: {"rope_scaling": {"rope_type": kind, "factor": 4.0, **more}}
yarn = functools.partial(scaled, "yarn")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1, 2, 4, 8]}
IN_NEW = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}
LINEAR_IN_NEW = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "linear", "factor": 2.0}}
ORIGINAL = {"original_max_position_embeddings": 16}
LAYERS = ["sliding_attention", "full_attention", "full_attention"]
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

# Changes that transformers reads: logits move in at least one family, and ours are the same in all.
READ: list[dict[str, Any]] = [
    # the base, wherever it stands
    {"rope_theta": GONE}, {"rope_theta": 1000.0}, {"rope_theta": 1}, {"rope_theta": 0.5}, {"rope_theta": 31}, IN_NEW,
    {**IN_NEW, "rope_theta": GONE}, {**IN_NEW, "rope_theta": None}, {"rope_parameters": {}, "rope_theta": GONE},
    {"rope_theta": GONE, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    # rope_scaling replaces rope_parameters as a whole
    {**IN_NEW, **yarn()}, {**IN_NEW, **yarn(), "rope_theta": GONE}, {**IN_NEW, **yarn(rope_theta=20.0)},
    {**IN_NEW, **scaled("linear")}, {**IN_NEW, **scaled("llama3", **LLAMA3, **ORIGINAL), "rope_theta": GONE},
    {**LINEAR_IN_NEW, **yarn()}, {**LINEAR_IN_NEW, **scaled("dynamic"), "max_position_embeddings": 16},
    {**LINEAR_IN_NEW, "rope_scaling": {}}, {**LINEAR_IN_NEW, "rope_scaling": None},
    {**LINEAR_IN_NEW, "rope_scaling": False}, {**LINEAR_IN_NEW, "rope_scaling": {"rope_type": "default"}},
    # type and rope_type
    {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_parameters": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
    # factors
    scaled("linear", factor=2), scaled("linear", factor=1.5), scaled("linear", **ORIGINAL),
    {**scaled("dynamic"), "max_position_embeddings": 16}, {**scaled("dynamic"), "max_position_embeddings": 7},
    {**scaled("dynamic", **ORIGINAL), "max_position_embeddings": 20},
    {**scaled("dynamic"), "max_position_embeddings": 16, **ORIGINAL}, yarn(), yarn(**ORIGINAL),
    yarn(factor=None, **ORIGINAL), {**yarn(), **ORIGINAL}, {**yarn(), "max_position_embeddings": GONE},
    {**yarn(**ORIGINAL), "original_max_position_embeddings": 32}, yarn(original_max_position_embeddings=4),
    yarn(original_max_position_embeddings=1), yarn(attention_factor=0.5), yarn(attention_factor=2),
    yarn(attention_factor=None), yarn(mscale=0.7), yarn(mscale_all_dim=0.7), yarn(mscale=0.7, mscale_all_dim=0.3),
    yarn(mscale=0, mscale_all_dim=0.3), yarn(attention_factor=0.5, mscale=0.7, mscale_all_dim=0.3),
    yarn(beta_fast=8, beta_slow=2), yarn(beta_fast=0, beta_slow=0), yarn(beta_fast=None, beta_slow=None),
    yarn(beta_fast=2, beta_slow=2), yarn(beta_fast=1, beta_slow=8), yarn(truncate=False), yarn(truncate=None),
    yarn(truncate=False, original_max_position_embeddings=4), scaled("llama3", **LLAMA3),
    scaled("llama3", **LLAMA3, **ORIGINAL),
    {**scaled("llama3", **LLAMA3, **ORIGINAL), "original_max_position_embeddings": 32},
    {**scaled("llama3", **LLAMA3), **ORIGINAL}, scaled("llama3", low_freq_factor=2, high_freq_factor=9, **ORIGINAL),
    scaled("longrope", **LONG), scaled("longrope", **LONG, **ORIGINAL),
    scaled("longrope", **LONG, factor=None, **ORIGINAL), {**scaled("longrope", **LONG), **ORIGINAL},
    scaled("longrope", **LONG, attention_factor=2, **ORIGINAL),
    scaled("longrope", **LONG, original_max_position_embeddings=24),
    scaled("longrope", **LONG, original_max_position_embeddings=23),
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 50.0, **LONG, **ORIGINAL}},
    scaled("longrope", **LONG, factor=0.5, **ORIGINAL),
    # windows
    {"sliding_window": 5}, {"sliding_window": 1}, SLIDING, {**SLIDING, "max_window_layers": 0},
    {**SLIDING, "max_window_layers": 3}, {**SLIDING, "max_window_layers": GONE}, {**SLIDING, "layer_types": None},
    {**SLIDING, "layer_types": LAYERS}, {**SLIDING, "layer_types": LAYERS[::-1]},
    {**SLIDING, "layer_types": ["full_attention"] * 3},
    {**SLIDING, "layer_types": ["attention", "sliding_attention", "attention"]},
    # the rest
    {"rms_norm_eps": 0.5}, {"rms_norm_eps": 1e-2},
]  # fmt: skip
# Only in these families; elsewhere they are refused, because transformers cuts a Llama's cache to a window that its
# prompts do not have.
ONLY = {str(change): (*QWEN, "Mistral") for change in READ if change.get("sliding_window") or "layer_types" in change}
# What transformers stores, or what does not matter for logits: nothing moves in any family.
NEUTRAL: list[dict[str, Any]] = [
    {"rope_parameters": None}, {"rope_parameters": {}}, {"rope_scaling": None}, {"rope_scaling": False},
    {"rope_scaling": {"rope_type": "default", "factor": 8.0}},
    {"rope_parameters": {"type": "linear", "rope_type": "default"}},
    {"rope_scaling": {"rope_type": "default", "unknown": 3}}, {**scaled("dynamic"), "max_position_embeddings": GONE},
    scaled("dynamic", **ORIGINAL), ORIGINAL, {"original_max_position_embeddings": None},
    {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": None},
    {"rope_parameters": {"partial_rotary_factor": 0.5}}, {"head_dim": GONE, "_but": ("Qwen3",)},
    {"head_dim": None, "_but": QWEN}, {"sliding_window": GONE}, {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": GONE}, {"max_window_layers": 1},
    {"layer_types": ["full_attention"] * 3, "_but": ("Mistral",)}, {"layer_types": None, "_but": ("Mistral",)},
    {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0, "_but": ("Llama", "Mistral")},
    {"hidden_act": "swish"}, {"hidden_act": GONE}, {"rms_norm_eps": GONE}, {"tie_word_embeddings": GONE},
    {"attention_bias": True, "_but": ("Llama", "Qwen3")}, {"mlp_bias": True, "_but": ("Llama",)},
    {"attention_bias": False}, {"attention_dropout": 0.5}, {"pretraining_tp": 4}, {"initializer_range": 0.9},
    {"use_cache": False}, {"is_causal": True}, {"is_decoder": False}, {"add_cross_attention": True},
    {"output_hidden_states": True}, {"output_attentions": True}, {"chunk_size_feed_forward": 4},
    {"tie_last_hidden_states": True}, {"dtype": "float16"}, {"torch_dtype": "float16"}, {"per_layer_config": {}},
    {"quantization_config": None}, {"num_labels": 5}, {"id2label": {"0": "a"}}, {"mlp_layer_types": ["sparse"] * 3},
    {"mtp_layer_types": ["x"]}, {"gradient_checkpointing": True}, {"_attn_implementation": "sdpa"},
    {"transformers_version": "4.0"}, {"architectures": GONE}, {"architectures": None},
    {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4}, {"pad_token_id": -1}, {"eos_token_id": None},
    {"num_experts": 0}, {"num_local_experts": None}, {"n_routed_experts": None, "num_experts_per_tok": 2},
    {"fusion_config": None}, {"text_config": None}, {"temperature": 0.1}, {"max_length": 5},
    {"default_rope_type": "linear"},
    # keys of other architectures
    {"no_such_key": 7}, {"logit_scale": 0.5}, {"logits_scaling": 8.0}, {"residual_multiplier": 3.0},
    {"embedding_multiplier": 12.0}, {"attention_multiplier": 0.1}, {"final_logit_softcapping": 3.0},
    {"attn_logit_softcapping": 3.0}, {"query_pre_attn_scalar": 9}, {"use_qk_norm": True},
    {"no_rope_layers": [0, 0, 0]}, {"rope_interleaved": True}, {"rotary_pct": 0.5}, {"clip_qkv": 0.1},
    {"attn_temperature_tuning": True}, {"scale_attn_weights": False}, {"norm_type": "layernorm"},
    {"parallel_attn": True},
]  # fmt: skip
# Refused by name, in every family or in those of `_in`: transformers computes something else with it, or fails.
REFUSE: list[dict[str, Any]] = [
    {"rope_theta": None}, {"rope_parameters": {"rope_theta": None}}, {"rope_theta": "100"}, {"rope_theta": True},
    {"rope_theta": -100.0}, {"rope_theta": 0}, {"rope_parameters": [1]}, {"rope_parameters": "x"},
    {"rope_scaling": "x"}, {"rope_scaling": [1]}, {"rope_parameters": {"rope_type": None}},
    {"rope_scaling": {"rope_type": "su", "factor": 2.0}}, {"rope_scaling": {"rope_type": "mrope"}},
    {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"full_attention": {"rope_theta": 50.0}, "sliding_attention": {"rope_theta": 20.0}}},
    {**scaled("linear"), "partial_rotary_factor": 0.5}, scaled("linear", partial_rotary_factor=0.9),
    yarn(partial_rotary_factor=None, **ORIGINAL) | {"partial_rotary_factor": 0.5},
    {"rope_scaling": {"rope_type": "linear"}}, scaled("linear", factor=None), scaled("linear", factor="2"),
    scaled("linear", factor=True), scaled("linear", factor=0.5), {"rope_scaling": {"rope_type": "yarn"}},
    {**yarn(**ORIGINAL), "original_max_position_embeddings": None}, yarn(original_max_position_embeddings=None),
    yarn(attention_factor=0.0), yarn(attention_factor=-1.0), {**yarn(), "rope_theta": 1.0}, yarn(truncate=0),
    yarn(beta_fast="8"), scaled("llama3"), scaled("llama3", low_freq_factor=4.0, high_freq_factor=4.0),
    scaled("longrope", short_factor=[2], long_factor=[3]), scaled("longrope", short_factor=LONG["short_factor"]),
    scaled("longrope", **(LONG | {"long_factor": [1, 2, 4, 0]})), {"sliding_window": 5, "_in": ("Llama",)},
    {**SLIDING, "_in": ("Llama",)}, {"sliding_window": 0, "_in": ("Llama", "Mistral")}, {"layer_types": LAYERS},
    {"layer_types": LAYERS, "sliding_window": 5, "_in": ("Llama", *QWEN)},
    {"layer_types": LAYERS[:2], "sliding_window": 5}, {"layer_types": ["chunked_attention"] * 3}, {"layer_types": []},
    {"layer_types": ["full_attention"] * 3, "_in": ("Mistral",)}, {"use_sliding_window": None, "_in": QWEN},
    {"use_sliding_window": 1, "_in": QWEN}, {"attention_chunk_size": 4},
    {"attention_bias": None, "_in": ("Llama", "Qwen3")}, {"mlp_bias": "x", "_in": ("Llama",)},
    {"tie_word_embeddings": None}, {"hidden_act": None}, {"hidden_act": "gelu"}, {"rms_norm_eps": None},
    {"rms_norm_eps": "1e-6"}, {"rms_norm_eps": -1e-6}, {"is_causal": False}, {"is_causal": None},
    {"kv_sharing_modes": ["own", "own", "reuse"]}, {"per_layer_config": {"0": {"intermediate_size": 40}}},
    {"attribute_map": {"hidden_size": "d"}}, {"transformers_weights": "x.safetensors"}, {"fusion_config": {"a": 1}},
    {"text_config": {"vocab_size": 3}}, {"text_encoder": {}}, {"decoder": {"x": 1}}, {"generator": 1},
    {"_rope_type_labels": ["rope_theta"]}, {"is_encoder_decoder": True},
    {"configuration_files": ["config.4.0.0.json"]}, {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"auto_map": {"AutoModel": "x.Y"}}, {"num_local_experts": 8}, {"head_dim": None, "_in": QWEN},
    {"num_key_value_heads": None, "_in": ("Mistral",)}, {"num_key_value_heads": 3}, {"num_hidden_layers": "3"},
    {"num_hidden_layers": True}, {"num_hidden_layers": 3.0}, {"hidden_size": 32.0}, {"max_position_embeddings": None},
    {"max_position_embeddings": "64"}, {"max_position_embeddings": 0}, {"eos_token_id": True}, {"eos_token_id": "x"},
    {"bos_token_id": "x"}, {"eos_token_id": [2, "x"]}, {"eos_token_id": -5}, {"eos_token_id": 2**31},
    {"pad_token_id": 1.5}, {"architectures": ["GPT2LMHeadModel"]}, {"model_type": "gpt2"},
    {"architectures": ["MistralForCausalLM"], "_in": ("Llama", *QWEN)},
]  # fmt: skip
# Settings whose point is that nothing is left of what else stands there.
EQUAL_TO_BASE = [
    {**LINEAR_IN_NEW, "rope_scaling": {"rope_type": "default"}}, {**SLIDING, "layer_types": ["full_attention"] * 3},
]  # fmt: skip
COUNTS: collections.Counter[str] = collections.Counter()
MOVED: set[str] = set()


@dataclasses.dataclass
class Bench:
    """A tiny model of a family in a folder whose config.json is written anew for every cell."""

    family: str
    folder: Path
    raw: dict[str, Any]
    weights: dict[str, np.ndarray]

    def change(self, change: dict[str, Any]) -> None:
        raw = copy.deepcopy(self.raw)
        for key, value in change.items():
            if key in ("_in", "_but"):
                continue
            if value is GONE:
                raw.pop(key, None)
            else:
                raw[key] = value
        (self.folder / "config.json").write_text(json.dumps(raw))

    def theirs(self) -> np.ndarray | None:
        """[T, N], or None where transformers fails."""
        import transformers

        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, attn_implementation="eager"
            )
            with torch.no_grad():
                out = model.eval()(torch.tensor(IDS[None]))
        except Exception:  # noqa: BLE001 - it raises whatever its parts raise
            return None
        return out.logits[0].numpy()

    def ours(self) -> np.ndarray:
        source = Folder(self.folder)
        model = hf_config.parse(source.config(), "config.json")
        wanted = rules.pairs(model)
        rules.check_names(self.weights, wanted, "config.json")
        for name, pair in wanted.items():
            rules.check_shape(pair, self.weights[name].shape, "config.json")
        params = rules.nested({pair.path: pair.ours(self.weights[name]) for name, pair in wanted.items()})
        return numpy_logits(model, params, IDS)


@functools.cache
def _bench(family: str, root: Path) -> Bench:
    import transformers

    folder = root / family
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**BASE)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    raw = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), **BASE}
    return Bench(family, folder, raw, load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request, tmp_path_factory, quiet):
    return _bench(request.param, Path(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def quiet():
    """No warnings of transformers about configurations that are odd on purpose; parameter shapes are asked once."""
    import logging

    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of a product this small wait for each other longer than they compute
    pairs, known = rules.pairs, {}

    def cached(model):
        same = dataclasses.replace(
            model, rope_base=2.0, rope_scaling=RopeScaling(), mixers=("softmax",), max_positions=1, norm_eps=1.0
        )
        return known.setdefault(same, pairs(same)) if same not in known else known[same]

    patch = pytest.MonkeyPatch()
    patch.setattr(rules, "pairs", cached)
    yield
    patch.undo()
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(np.abs(ours - theirs).max() < 1e-4 * max(1, np.abs(theirs).max()))


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_reads_is_read_and_the_rest_passed_over(bench):
    bench.change({})
    base = bench.theirs()
    assert base is not None
    wrong, moved = [], set()
    for change in READ + NEUTRAL:
        if bench.family in change.get("_but", ()) or bench.family not in ONLY.get(str(change), FAMILIES):
            continue
        bench.change(change)
        theirs = bench.theirs()
        assert theirs is not None, f"transformers fails on {change}: it belongs to REFUSE"
        try:
            ours = bench.ours()
        except UserError as error:
            wrong.append(f"{change}: refused ({error})")
            continue
        if not close(ours, theirs):
            wrong.append(f"{change}: differs by {np.abs(ours - theirs).max():.3g}")
        COUNTS["agree"] += 1
        if np.abs(theirs - base).max() > 1e-3:
            moved.add(str(change))
    assert not wrong, "\n".join(wrong)
    still = [change for change in NEUTRAL if str(change) in moved]
    assert not still, f"these move logits, so they are not neutral: {still}"
    COUNTS["moved"] += len(moved)
    COUNTS["families"] += 1
    MOVED.update(moved)


@pytest.mark.filterwarnings("ignore")
def test_what_is_not_computed_is_refused_by_name(bench):
    wrong = []
    for change in REFUSE:
        if bench.family not in change.get("_in", FAMILIES):
            continue
        bench.change(change)
        inner = [key for value in change.values() if isinstance(value, dict) for key in value]
        try:
            bench.ours()
            wrong.append(f"{change}: read")
        except UserError as error:
            text = str(error)
            if not any(key.strip("_") in text for key in (*change, *inner)) or "\n" in text or len(text) > 600:
                wrong.append(f"{change}: {text}")
        COUNTS["refused"] += 1
    assert not wrong, "\n".join(wrong)


def test_every_setting_that_is_read_moves_logits_somewhere(quiet):
    """Else the matrix would be green on a key that it does not try. Prints the count."""
    if COUNTS["families"] < len(FAMILIES):
        pytest.skip("needs the cells of all families")
    keys = {key for change in READ + NEUTRAL + REFUSE for key in change} - {"_in", "_but"}
    keys |= {key for change in READ for value in change.values() if isinstance(value, dict) for key in value}
    print(
        f"\n{len(keys)} keys in {len(READ + NEUTRAL + REFUSE)} settings x {len(FAMILIES)} families: {COUNTS['agree']} "
        f"agree to 1e-4 ({COUNTS['moved']} of them away from the default), {COUNTS['refused']} are refused by name"
    )
    assert {str(change) for change in READ} - MOVED == {str(change) for change in EQUAL_TO_BASE}


@pytest.mark.parametrize("family", [*FAMILIES, "Ministral"])
def test_what_is_not_there_has_the_default_of_its_class(family):
    import transformers

    theirs = getattr(transformers, f"{family}Config")()
    model = hf_config.parse({"model_type": family.lower()})
    names = {
        "vocab_size": "vocab_size", "d_model": "hidden_size", "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps",
        "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
        "max_positions": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings",
    }  # fmt: skip
    assert {ours: getattr(model, ours) for ours in names} == {ours: getattr(theirs, n) for ours, n in names.items()}
    assert model.head_dim == (getattr(theirs, "head_dim", None) or 4096 // 32)
    assert (model.rope_base, model.rope_scaling) == (theirs.rope_parameters["rope_theta"], RopeScaling())
    assert model.mixers == (f"softmax(window={theirs.sliding_window})" if "istral" in family else "softmax",)
    small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    theirs = getattr(transformers, f"{family}Config")(**small)
    parsed = hf_config.parse({"model_type": family.lower(), **small})
    assert parsed.head_dim == (getattr(theirs, "head_dim", None) or 64 // 2)
    sliding = hf_config.parse({"model_type": family.lower(), "use_sliding_window": True})
    if family in QWEN:
        theirs = getattr(transformers, f"{family}Config")(use_sliding_window=True)
        windows = [sliding.mixer(i).window for i in range(sliding.num_layers)]
        assert windows == [4096 if kind == "sliding_attention" else None for kind in theirs.layer_types]


ODD = (
    True, False, "x", "4", "", [], [1], ["a"], [[1]], {}, {"a": 1}, {"a": {"b": 1}}, -1, 0, 1, 1.5, -0.0, float("inf"),
    float("nan"), 10**30, -(10**30), 10**400, None, 2**31, 1e-320, 1e308, "é\n" * 300_000,
)  # fmt: skip


def test_any_value_of_any_key_is_read_or_refused_in_one_short_sentence():
    """Types, signs and sizes that no checkpoint has, in every key and every kind of rope; never another exception."""
    keys = {key for change in READ + NEUTRAL + REFUSE for key in change} | set(BASE) | {"model_type"}
    inner = {key for change in READ for value in change.values() if isinstance(value, dict) for key in value}
    wrong, count = [], 0
    for family in FAMILIES:
        base = {**BASE, "model_type": family.lower()}
        raws = [(key, {**base, key: value}) for key in keys for value in ODD]
        # One reader of rope for all families: all its kinds in the first, and one in each of the others
        kinds = ("default", "linear", "dynamic", "yarn", "llama3", "longrope") if family == FAMILIES[0] else ("yarn",)
        for kind in kinds:
            rope = {"rope_type": kind, "factor": 4.0, **LONG, **LLAMA3}
            raws += [(f"{kind} {key}", {**base, "rope_scaling": {**rope, key: v}}) for key in inner for v in ODD]
        for name, raw in raws:
            count += 1
            try:
                hf_config.parse(raw)
            except UserError as error:
                if "\n" in str(error) or len(str(error)) > 500:
                    wrong.append(f"{name}: {str(error)[:200]}")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the fault that is looked for
                wrong.append(f"{name}: {type(error).__name__} {str(error)[:200]}")
    assert not wrong, "\n".join(wrong[:20])
    assert count > 10_000


# Names that transformers asks a configuration for, which are its own doing and no keys of a file.
INNER = (
    "_attn_implementation", "_attn_implementation_internal", "_experts_implementation", "experts_implementation",
    "_experts_implementation_internal", "_heterogeneity_spec", "_name_or_path", "_output_attentions", "_post_init_done",
    "attn_implementation", "base_model_ep_plan", "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan",
    "default_theta", "ignore_keys_at_rope_validation", "is_heterogeneous", "label2id", "name_or_path", "num_heads",
    "num_labels", "problem_type", "return_dict", "sub_configs", "sub_configs_defaults", "vision_aspect_ratio",
    "vision_feature_layer", "vision_feature_select_strategy", "embed_dim", "distributed_config",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_no_key_that_transformers_asks_for_is_unknown_here(tmp_path_factory, quiet, monkeypatch):
    """Recorded while it opens a model, computes logits and generates; a new transformers that reads more fails here."""
    import transformers

    asked: set[str] = set()
    get = transformers.PreTrainedConfig.__getattribute__

    def record(self, name):
        asked.add(name)
        return get(self, name)

    for family in ("Llama", "Qwen2"):
        bench = _bench(family, Path(tmp_path_factory.getbasetemp()))
        bench.change({})
        monkeypatch.setattr(transformers.PreTrainedConfig, "__getattribute__", record)
        model = transformers.AutoModelForCausalLM.from_pretrained(bench.folder, attn_implementation="eager").eval()
        model.generate(torch.tensor(IDS[None]), max_new_tokens=2, do_sample=False, pad_token_id=0)
        monkeypatch.undo()
    tried = {key for change in READ + NEUTRAL + REFUSE for key in change} | set(BASE) | {"model_type", "architectures"}
    generation = set(transformers.GenerationConfig._get_default_generation_params())
    methods = {name for name in asked if callable(getattr(transformers.PreTrainedConfig, name, None))}
    dunder = {name for name in asked if name.startswith("__")}
    unknown = asked - tried - set(INNER) - generation - methods - dunder - set(REFUSED_KEYS)
    assert not unknown, f"transformers reads {sorted(unknown)}: give each a cell"


SAMPLE = [
    yarn(original_max_position_embeddings=1), yarn(mscale=0.7, mscale_all_dim=0.3, truncate=False),
    scaled("longrope", **LONG, **ORIGINAL), {**SLIDING, "layer_types": LAYERS},
]  # fmt: skip


@pytest.mark.parametrize("change", SAMPLE, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_model_itself_computes_what_the_numpy_decoder_computes(change, tmp_path_factory, quiet):
    bench = _bench("Mistral", Path(tmp_path_factory.getbasetemp()))
    bench.change(change)
    source = Folder(bench.folder)
    params, model, _ = read_params(source, hf_config.parse(source.config()))
    ours = jax.jit(lambda p: Decoder(model).apply({"params": p}, jnp.asarray(IDS[None], jnp.int32)))(params)[0]
    theirs = bench.theirs()
    assert theirs is not None
    assert close(np.asarray(ours), theirs)
