"""Five tiny HuggingFace folders in the styles of real families: tokenizer, chat template, random model; and prompts.

Tokenizers are trained on the standard library's text and saved as their families save theirs.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
STYLES = ("llama2", "llama3", "mistral", "qwen2.5", "qwen3")
PIECES = (
    "hello", "World", "don't", "it's", "naïve", "café", "cafe\u0301", "Größe", "東京", "タワー", "한국", "مرحبا", "🙂",
    "👨\u200d👩\u200d👧", "12", "3.14", "x=1", "def f(a):", "...", "?!", "(no)", "[INST]", "\n", "\n\n", "\t", "  ",
    "    ", "\u00a0", "\u3000", "▁", "\u0000", "<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "<tool_call>",
    " xylophones",
)  # fmt: skip


def prompts(count: int, seed: int = 0) -> list[str]:
    """Texts of odd pieces: several scripts, blanks, special tokens, and the empty one."""
    rng = random.Random(seed)
    joined = lambda: "".join(rng.choice(PIECES) + rng.choice(["", " ", " ", "  "]) for _ in range(rng.randint(1, 12)))
    return ["", " ", "\n", "hello", " hello ", *(joined() for _ in range(count - 5))]


def chats(count: int, seed: int = 1) -> list[list[dict[str, str]]]:
    """Conversations of one to five messages, some with a system message."""
    rng, texts = random.Random(seed), prompts(count * 3, seed)
    made = []
    for _ in range(count):
        first = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.4 else []
        turns = 2 * rng.randint(0, 2) + 1
        roles = ["user" if i % 2 == 0 else "assistant" for i in range(turns)]
        made.append([*first, *({"role": role, "content": rng.choice(texts)} for role in roles)])
    return made


@functools.cache
def corpus() -> list[str]:
    import email
    import json as package

    files = [path for module in (email, package) for path in sorted(Path(module.__file__).parent.glob("*.py"))]
    odd = "naïve café Größe 東京 タワー 한국 مرحبا 🙂 don't it's 12 3.14\n\n    x = [1, 2]\n"
    return [path.read_text("utf-8") for path in files] + [odd * 30]


@functools.cache
def byte_bpe(expression: str, special: tuple[str, ...]) -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(list(special))  # behind the vocabulary, as Llama 3 and Qwen have them
    return made.to_str()


@functools.cache
def pieces_bpe() -> str:
    """SentencePiece's kind of BPE: blanks are ▁, what has no piece becomes bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=True)  # for the training alone
    control = ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=control + octets, limit_alphabet=90, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    raw = json.loads(made.to_str())
    raw["pre_tokenizer"] = None
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] in control]
    made = Tokenizer.from_str(json.dumps(raw))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made.to_str()


def added(tokenizer: Tokenizer) -> dict[str, Any]:
    flags = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")
    return {str(i): {f: getattr(t, f) for f in flags} for i, t in sorted(tokenizer.get_added_tokens_decoder().items())}


TEMPLATES = {
    "llama2": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set intro = '<<SYS>>\\n' + \
messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest = messages %}{% set intro = '' %}{% endif %}\
{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}\
{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (intro if loop.first else '') + \
m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}""",
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + date_string + ".\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYS]' ~ m.content ~ '[/SYS]' }}\
{% elif m.role == 'user' %}{{ '[INST]' ~ m.content ~ '[/INST]' }}{% else %}{% generation %}{{ m.content ~ eos_token }}\
{% endgeneration %}{% endif %}{% endfor %}""",
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}{% if message.name %}{{ ' ' + message.name }}{% endif %}
    {{- '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and message.content is string %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and message.reasoning_content is string and loop.index0 > ns.last %}
        {%- set content = '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
}


def tokenizer_files(style: str, folder: Path) -> int:
    """Write the tokenizer's files of a style into the folder; how many tokens the model needs."""
    text = json.dumps
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": 4096}
    if style in ("llama2", "mistral"):
        made = Tokenizer.from_str(pieces_bpe())
        if style == "mistral":
            made.normalizer = None
            made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
            made.add_special_tokens([AddedToken("[INST]", special=True), AddedToken("[/INST]", special=True)])
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
        config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config["added_tokens_decoder"] = added(made)
    elif style == "llama3":
        names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        raw = json.loads(byte_bpe(LLAMA3, names))
        raw["model"]["ignore_merges"] = True
        raw["model"]["vocab"]["Ġxylophones"] = (
            max(token["id"] for token in raw["added_tokens"]) + 1
        )  # no merge reaches it
        made = Tokenizer.from_str(text(raw))
        first = names[0]
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{first}:0 $A:0",
                    pair=f"{first}:0 $A:0 {first}:1 $B:1",
                    special_tokens=[(first, made.token_to_id(first))],
                ),
            ]
        )
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": first, "eos_token": "<|eot_id|>"}
        config["added_tokens_decoder"] = added(made)
    else:
        names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        made = Tokenizer.from_str(byte_bpe(QWEN2, names))
        made.normalizer = normalizers.NFC()
        if style == "qwen3":
            made.add_tokens(
                [AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
            )
        config |= {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False}
        config |= {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
        config |= {"errors": "replace", "split_special_tokens": False, "additional_special_tokens": list(names[1:])}
        config["added_tokens_decoder"] = added(made)
    made.save(str(folder / "tokenizer.json"))
    if style in ("llama2", "qwen2.5"):
        config["chat_template"] = TEMPLATES[style]
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATES[style], "utf-8")
    (folder / "tokenizer_config.json").write_text(text(config), "utf-8")
    return max(made.get_vocab(with_added_tokens=True).values()) + 1


def build(style: str, folder: Path) -> Any:
    """A tiny random model with the style's tokenizer, saved; returns transformers' model."""
    import torch
    import transformers

    size = tokenizer_files(style, folder)
    kind = {"llama2": "Llama", "llama3": "Llama", "mistral": "Mistral", "qwen2.5": "Qwen2", "qwen3": "Qwen3"}[style]
    more = {"head_dim": 8} if style == "qwen3" else {"sliding_window": None} if style == "mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.4, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, **more,
    )  # fmt: skip
    torch.manual_seed(STYLES.index(style))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(folder)
    return model
