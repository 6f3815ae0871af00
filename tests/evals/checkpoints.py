"""Tiny random checkpoints in HuggingFace's form, whose tokenizers begin, end and cut texts as well-known ones do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = "the of and a to in is was he for it with as his on be at by that from not are but or have an they which one"
CONTEXT = 320  # max_position_embeddings

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n' }}{{ m['content'] | trim }}{{ '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n' }}{% endif %}"
)
TURNS = (  # has no system role
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def text(rng: np.random.Generator, words: int) -> str:
    """Words, numbers and other scripts."""
    odd = ["42", "naïve", "日本", "🙂", "x,y", "(end)", "It's", "\n", "  two"]
    pick = [str(rng.choice(WORDS.split())) if rng.random() < 0.8 else str(rng.choice(odd)) for _ in range(words)]
    return " ".join(pick)


def tokenizer(kind: str) -> tuple[Any, dict[str, str], str]:
    """A trained `tokenizers.Tokenizer`, its named special tokens and its chat template; kinds as in `build`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = [text(np.random.default_rng(i), 40) for i in range(60)]
    if kind == "llama2":
        special = ["<unk>", "<s>", "</s>"]
        inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = pre_tokenizers.Split(
            "▁", "merged_with_next"
        )  # for the training alone: no word holds a blank
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=special + alphabet))
        state = json.loads(inner.to_str()) | {
            "pre_tokenizer": None
        }  # bytes are no special tokens, though they had to come first
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special]
        inner = Tokenizer.from_str(json.dumps(state))
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bos, named, template = "<s>", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, TURNS
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        bytes_ = pre_tokenizers.ByteLevel.alphabet()
        inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=bytes_))
        if kind == "llama3":
            bos, named, template = "<|begin|>", {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}, HEADERS
            extra = ["<|begin|>", "<|end_text|>", "<|eot|>", "<|start|>", "<|end|>"]
        else:
            bos, named, template = "", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML
            extra = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in extra])
    if bos:
        template_of = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, inner.token_to_id(bos))]
        )
        inner.post_processor = template_of
    return inner, named, template


def build(kind: str, folder: Path, **config: Any) -> Path:
    """A folder that transformers and `convert.from_hf` read; llama2 and llama3 begin a text with BOS, qwen does not."""
    import torch
    import transformers

    inner, named, template = tokenizer(kind)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **named, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    fast.save_pretrained(folder)
    eos = fast.eos_token_id
    fields = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": eos,
    }
    torch.manual_seed(0)
    model_class = transformers.Qwen2ForCausalLM if kind == "qwen" else transformers.LlamaForCausalLM
    model = model_class(model_class.config_class(**(fields | config)))
    others = {"llama3": ["<|end_text|>"], "qwen": ["<|endoftext|>"], "llama2": []}[kind]
    ends = [eos, *(fast.convert_tokens_to_ids(name) for name in others)]
    model.generation_config = transformers.GenerationConfig(bos_token_id=fast.bos_token_id, eos_token_id=ends)
    model.save_pretrained(folder)
    return folder
