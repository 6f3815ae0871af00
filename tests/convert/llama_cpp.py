"""What llama.cpp makes of tiny GGUF vocabularies, kept in llama_cpp_ids.json.

`python -m tests.convert.llama_cpp` makes that file anew, with llama-cpp-python and sentencepiece; the tests need
neither.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix("").with_name("llama_cpp_ids.json")
KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5
WORDS = (
    "The cat's hat isn't where the dog's been; we'll find it, they've said, and I'm sure you're right.",
    "In 2024 about 1234567 people walked 3.14 miles, 10% more than in 1999 (and 42 ran).",
    "def area(x, y):\n    return x * y  # not [0, 1]\n\nfor i in range(10):\n\tprint(i, area(i, i + 1))\n",
    "Ünder ÄRGER größe naïve café CAFÉ Ελλάδα привет Мир 東京 タワー 한국 مرحبا हिन्दी",
    "walking talking walked talked walks talks the then there these other another mother",
)
TEXTS = (
    "", "a", " a", "a ", "hello world", "The cat's hat  isn't\n\n\n there, WE'LL see", "DON'T it'S I'm",
    "x=[1,2];y+=3.14", "1 12 123 1234 12345 123456", " 7,000,000 years", "naïve café CAFÉ Ünder ÄRGER",
    "größe GRÖSSE ßx", "東京タワー、한국", "مرحبا हिन्दी", "🙂 👨\u200d👩\u200d👧", "tabs\t\tand  \t mixed",
    "line\r\nend\r\n\r\n", "  lead", "trail   ", "\n", "\n \n",
    "a\u00a0b\u3000c", "²½Ⅷ٣", "<s>x</s> <unk>y", "<|im_start|>user\nhi <|im_end|>\n", "a<tool> b <tool>c", "▁ _ ▁▁",
    "walkingtalkedmother abc", "$5 #tag @me a/b \\n http://x.y/z?q=1", "Iİı Ǆǅǆ", "<|end|><|call|></s>",
)  # fmt: skip
SPECIAL = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<tool>": USER}


def case(model: str, more: dict[str, int] | None = None, **fields: Any) -> dict[str, Any]:
    return {"model": model, "more": more or {}, "fields": fields}


BPE = {"bos_token_id": 1, "eos_token_id": 2}
PRES = (
    "default", "gpt-2", "smollm", "llama-bpe", "dbrx", "minicpm5", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3",
    "deepseek-coder", "falcon", "bailingmoe", "seed-coder",
)  # fmt: skip
CASES = {
    **{pre: case("gpt2", SPECIAL, pre=pre, **BPE) for pre in PRES},
    "no pre": case("gpt2", **BPE),
    "no bos for llama 3": case("gpt2", SPECIAL, pre="llama3", add_bos_token=False, add_eos_token=True, **BPE),
    "bos for qwen2": case("gpt2", SPECIAL, pre="qwen2", add_bos_token=True, **BPE),
    "pieces": case("llama"),
    "pieces with special tokens": case("llama", SPECIAL, bos_token_id=1, eos_token_id=2, unknown_token_id=0),
    "pieces without a blank in front": case("llama", SPECIAL, add_space_prefix=False),
    "pieces without bos": case("llama", SPECIAL, add_bos_token=False, add_eos_token=True),
    "eot and eom": case("llama", {"<turn>": CONTROL, "<more>": CONTROL}, eot_token_id=-2, eom_token_id=-1),
    "ends by their text": case("gpt2", {"<|end_of_text|>": CONTROL, "<|eot_id|>": NORMAL, "<|eom_id|>": USER}, **BPE),
    "filling in": case(
        "gpt2", {"<|fim_pad|>": USER, "<|repo_name|>": CONTROL, "<|file_sep|>": NORMAL}, pre="qwen2", **BPE
    ),
    "filling in by key": case("gpt2", {"<|fim_pad|>": CONTROL, "<other>": CONTROL}, fim_pad_token_id=-1, **BPE),
    "harmony": case(
        "gpt2", {"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL, "<|channel|>": CONTROL}, **BPE
    ),
    "end without harmony": case("gpt2", {"<|end|>": NORMAL, "<|call|>": CONTROL}, **BPE),
    "an ordinary </s>": case("llama", {"<|tool_response>": CONTROL}),
    "unused and empty": case("llama", {"": UNUSED, "[PAD9]": UNUSED}),
}


@functools.cache
def kept() -> dict[str, Any]:
    return json.loads(FILE.read_text("utf-8"))


def fields_of(name: str, vocabularies: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a case; negative ids count from the end."""
    made = CASES[name]
    kind = vocabularies["bpe" if made["model"] == "gpt2" else "pieces"]
    tokens, types = [*kind["tokens"], *made["more"]], [*kind["types"], *made["more"].values()]
    fields: dict[str, Any] = {"model": made["model"], "tokens": tokens, "token_type": types}
    if made["model"] == "gpt2":
        fields["merges"] = kind["merges"]
    else:
        fields["scores"] = [*kind["scores"], *[-1000.0] * len(made["more"])]
    for key, value in made["fields"].items():
        fields[key] = value % len(tokens) if type(value) is int else value
    return {KEY + key: value for key, value in fields.items()}


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """A GGUF file of a tokenizer alone."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in fields.items():
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabularies(folder: Path) -> dict[str, Any]:
    import sentencepiece
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    )
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += ["walkingtalked", "Ġabc"]  # which no merge reaches
    types = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 3)
    bpe = {"tokens": tokens, "merges": [" ".join(m) for m in model["merges"]], "types": types}
    (folder / "words.txt").write_text("\n".join(WORDS * 3), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "pieces"), model_type="bpe", vocab_size=480,
        byte_fallback=True, character_coverage=0.98, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, split_digits=True,
        allow_whitespace_only_pieces=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    p = sentencepiece.SentencePieceProcessor(str(folder / "pieces.model"))
    ids = range(p.get_piece_size())
    kind = lambda i: UNKNOWN if p.is_unknown(i) else CONTROL if p.is_control(i) else 6 if p.is_byte(i) else NORMAL
    pieces = {"tokens": [p.id_to_piece(i) for i in ids], "scores": [p.get_score(i) for i in ids]}
    return {"bpe": bpe, "pieces": pieces | {"types": [kind(i) for i in ids]}}


def _asked(path: Path) -> dict[str, Any]:
    """llama.cpp's ids of every text, with what it puts around a text and without, and its ends of generation."""
    import llama_cpp as lib

    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, path
    vocab = lib.llama_model_get_vocab(model)

    def ids(text: str, around: bool) -> list[int]:
        raw = text.encode()
        room = (lib.llama_token * (2 * len(raw) + 16))()
        return list(room[: lib.llama_tokenize(vocab, raw, len(raw), room, len(room), around, True)])

    found = {
        "ids": [ids(text, True) for text in TEXTS],
        "plain": [ids(text, False) for text in TEXTS],
        "ends": [i for i in range(lib.llama_vocab_n_tokens(vocab)) if lib.llama_vocab_is_eog(vocab, i)],
    }
    lib.llama_model_free(model)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabularies = _vocabularies(folder)
        cases = {case: _asked(write_gguf(folder / "x.gguf", fields_of(case, vocabularies))) for case in CASES}
    raw = json.dumps({**vocabularies, "cases": cases}, ensure_ascii=False, separators=(",", ":"))
    FILE.write_text(raw + "\n", "utf-8")


if __name__ == "__main__":
    main()
