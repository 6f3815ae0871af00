"""The tokenizer files of a HuggingFace folder, put together by the rules of transformers 5.24's AutoTokenizer.

The rules hold surprises. Of a folder's files the class decides: `PreTrainedTokenizerFast` (and whatever is not known)
takes tokenizer.json as it is, while `LlamaTokenizer`, `Qwen2Tokenizer` and `GPT2Tokenizer` take only its vocabulary,
merges, post-processor and added tokens and bring their own way to cut, normalise and decode text. Which class it is
depends on tokenizer_config.json and on config.json's model_type. `added_tokens_decoder` in tokenizer_config.json shuts
out special_tokens_map.json and added_tokens.json; add_bos_token and add_eos_token count only without a tokenizer.json.
Other classes and formats (SentencePiece, tiktoken, tekken) are left to transformers itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxattn.errors import Corrupt, Incomplete, Unsupported, shown
from jaxattn.hf_added_tokens import CONFIG, JSON, add, added_tokens, post_process, settings_of, special_tokens
from jaxattn.json_text import field, optional_object
from jaxattn.rust import guarded
from jaxattn.split_regex import QWEN2_SPLIT

if TYPE_CHECKING:
    import tokenizers

OTHER = ("tekken.json", "tokenizer.model", "tiktoken.model")  # which transformers prefers to vocab.json
FILES = (JSON, "vocab.json", *OTHER)
GGUF = "gguf"  # files of convert.gguf_tokenizer: their tokenizer.json is the whole truth
AS_SAVED = "TokenizersBackend"
REGISTERED = {"llama": None, "mistral": AS_SAVED, "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
FORCED = ("qwen2",)  # model types whose own class wins over the one that is declared
DEFAULTS: dict[str, dict[str, str]] = {
    AS_SAVED: {},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a folder's files make: the tokenizer, its named tokens as a template sees them, and how it decodes."""

    inner: tokenizers.Tokenizer
    named: dict[str, str]
    clean_up: bool


def read(folder: Path) -> Parts:
    """The tokenizer of a folder.

    Raises:
      CheckpointError: there is none, a file of it is broken, or it needs a package that is not installed.
    """
    if not has_tokenizer(folder):
        raise Incomplete(f"{folder} has no tokenizer (none of {', '.join(FILES)}); copy the tokenizer's files there.")
    config = optional_object(folder / CONFIG)
    kind, why = _class_of(folder, config)
    saved = (folder / JSON).is_file()
    if kind == "LlamaTokenizer" and not saved and not any((folder / name).is_file() for name in OTHER):
        raise Unsupported(
            f"{folder}: a LlamaTokenizer is not made from vocab.json; add tokenizer.json or tokenizer.model."
        )
    if saved and kind in DEFAULTS:
        try:
            saved_json = optional_object(folder / JSON)
        except Corrupt as error:
            raise Corrupt(f"{folder / JSON} is not a tokenizer.json: {error}") from error
        if kind == AS_SAVED or field(saved_json, "model", dict, folder / JSON, {}).get("type") == "BPE":
            return _assemble(folder, config, kind, saved_json)
        why = f"{kind} whose tokenizer.json is no BPE"
    elif kind in ("Qwen2Tokenizer", "GPT2Tokenizer") and not any((folder / name).is_file() for name in OTHER):
        if not (folder / "merges.txt").is_file():
            raise Incomplete(f"{folder} has vocab.json but neither merges.txt nor tokenizer.json; add one of them.")
        return _assemble(folder, config, kind, None)
    return _by_transformers(folder, why)


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file that a tokenizer can be made of."""
    return any((folder / name).is_file() for name in FILES)


def _class_of(folder: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """The class of transformers that reads the folder, None where only transformers knows; and a word for it."""
    model = optional_object(folder / "config.json")
    kind = field(model, "model_type", str, folder / "config.json")
    declared = field(config, "tokenizer_class", str, folder / CONFIG)
    either = (declared or field(model, "tokenizer_class", str, folder / "config.json") or "").removesuffix("Fast")
    if config.get("made_from") == GGUF:
        return AS_SAVED, AS_SAVED
    own_code = config.get("auto_map") is not None
    odd = next((key for key in ("fast_tokenizer_files", "fix_mistral_regex", "init_inputs") if config.get(key)), None)
    if odd or (own_code and not declared):
        return None, f"{odd or 'auto_map'} in {CONFIG}"
    if kind is not None and kind not in REGISTERED:
        return None, f"model type {shown(kind)}"
    known = lambda name: AS_SAVED if name in ("PreTrainedTokenizer", "PythonBackend") else name
    registered = REGISTERED.get(kind or "")
    if not own_code:
        if either == "LlamaTokenizer" and kind not in FORCED and _byte_level(folder):
            return AS_SAVED, either
        if either and registered and registered != either:
            if registered == AS_SAVED:
                return AS_SAVED, either
            either = registered if kind in FORCED else known(either)
            return (either if either in DEFAULTS else None), either
    name = known(either or registered or AS_SAVED)
    return (name if name in DEFAULTS else None), name


def _byte_level(folder: Path) -> bool:
    path = folder / JSON
    return path.is_file() and b'"ByteLevel"' in path.read_bytes()


def _assemble(folder: Path, config: dict[str, Any], kind: str, saved: dict[str, Any] | None) -> Parts:
    """The tokenizer of one of the classes in `DEFAULTS`; `saved` is tokenizer.json."""
    import tokenizers
    from tokenizers import AddedToken

    origin = folder / CONFIG
    settings = settings_of(folder, config, saved)
    added, by_text = added_tokens(folder, settings, saved)
    broken = (
        f"{folder / JSON} is not a tokenizer.json" if saved is not None else f"{folder}/vocab.json is no vocabulary"
    )
    with guarded(broken):
        if kind == AS_SAVED:
            inner = tokenizers.Tokenizer.from_file(str(folder / JSON))
            padding, post = inner.padding, inner.post_processor
        elif saved is not None:
            shell = {**saved, "model": {**saved["model"], "vocab": {}, "merges": []}, "added_tokens": []}
            bare = tokenizers.Tokenizer.from_str(json.dumps(shell))
            padding, post = bare.padding, bare.post_processor
            inner = _build(kind, settings, origin, *_vocabulary(saved["model"], folder / JSON))
        else:
            vocab, merges = tokenizers.models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            inner, padding, post = _build(kind, settings, origin, vocab, merges), None, None
    named, extra = special_tokens(settings, DEFAULTS[kind], by_text, origin)
    if padding is not None and kind in (AS_SAVED, "LlamaTokenizer") and "pad_token" not in settings:
        named["pad_token"] = AddedToken(padding["pad_token"], special=True)
    inner.encode_special_tokens = field(settings, "split_special_tokens", bool, origin, False)
    with guarded(f"{folder} has added tokens that cannot be used"):
        if config.get("made_from") != GGUF:
            add(inner, added, named, extra)
        if kind == "Qwen2Tokenizer":
            every = dict.fromkeys(token.content for token in (*named.values(), *extra))
            inner.add_tokens([AddedToken(text, special=True) for text in every])
        post_process(inner, post, settings, named, origin)
        inner.encode("a")  # a post-processor that names unknown tokens panics here, not later
    return Parts(inner, {name: token.content for name, token in named.items()}, _clean_up(settings, inner, origin))


def _vocabulary(model: dict[str, Any], origin: Path) -> tuple[dict[str, int], list[tuple[str, ...]]]:
    """Vocabulary and merges of the BPE in a tokenizer.json."""
    vocab, merges = field(model, "vocab", dict, origin, {}), field(model, "merges", list, origin, [])
    if not all(type(number) is int for number in vocab.values()):
        raise Corrupt(f"{origin}: its vocabulary has ids that are no whole numbers; download it again.")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise Corrupt(f"{origin}: merges has {shown(merge)} where two pieces of text belong.")
    return vocab, [tuple(p) for p in pairs]


def _build(kind: str, settings: dict[str, Any], origin: Path, vocab: Any, merges: Any) -> tokenizers.Tokenizer:
    """The pipeline that a class of transformers brings along."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    prefix = field(settings, "add_prefix_space", bool, origin)
    if kind == "LlamaTokenizer":
        prefix = prefix is not False
        legacy = field(settings, "legacy", bool, origin, False)
        scheme = ("always" if legacy else "first") if prefix else "never"
        made = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        strip = [decoders.Strip(content=" ", left=1)] if prefix else []
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        made.decoder = decoders.Sequence(steps)
        return made
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    made.decoder = decoders.ByteLevel()
    if kind == "GPT2Tokenizer":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix))
        return made
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=bool(prefix), use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    return made


def _clean_up(settings: dict[str, Any], inner: tokenizers.Tokenizer, origin: Path) -> bool:
    """Whether decoding takes blanks from before punctuation; transformers does not for BPE, unless it is forced to."""
    asked = field(settings, "clean_up_tokenization_spaces", bool, origin, False)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return asked and (type(inner.model).__name__ != "BPE" or field(settings, forced, bool, origin, False))


def _by_transformers(folder: Path, why: str) -> Parts:
    """What transformers itself makes of the folder; nothing in it is executed.

    Raises:
      Unsupported: transformers, or what it needs for these files, is not installed, or it refuses them.
    """
    pieces = [] if (folder / JSON).is_file() else [name for name in OTHER if (folder / name).is_file()]
    needed = ["transformers", *(["sentencepiece", "google.protobuf"] if "tokenizer.model" in pieces else [])]
    missing = [name.removeprefix("google.") for name in needed if not _installed(name)]
    what = f"{folder}: its tokenizer ({', '.join([why, *pieces])})"
    if missing:
        raise Unsupported(f"{what} is read with {' and '.join(missing)}: pip install {' '.join(missing)}.")
    from transformers import AutoTokenizer

    with guarded(f"{what} cannot be read by transformers"):
        made: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        inner = getattr(made, "backend_tokenizer", None)
        if inner is None:
            raise Unsupported(
                f"{what} is a {type(made).__name__}, which is not a fast tokenizer; add its tokenizer.json."
            )
    forced = made.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    clean = bool(made.clean_up_tokenization_spaces) and (type(inner.model).__name__ != "BPE" or bool(forced))
    return Parts(inner, dict(made.special_tokens_map), clean)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
