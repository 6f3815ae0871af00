"""How llama.cpp cuts text before byte-level merges, by the name a GGUF file gives in `tokenizer.ggml.pre`.

Every expression cuts the pieces that the one before it left. Where llama.cpp writes an expression otherwise than the
original tokenizer.json did (letters by "not a to z" in tekken and gpt-4o), its writing counts: a GGUF file is what
llama.cpp makes of it.
"""

from __future__ import annotations

import dataclasses

from jaxattn import split_regex as rx


@dataclasses.dataclass(frozen=True)
class Pre:
    """Expressions; whether a piece that is a token stays whole though no merge reaches it; whether BOS is usual."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_KINDS: dict[Pre, str] = {
    Pre(rx.DEFAULT): "default",
    Pre((rx.GPT2,)): "gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum mpt olmo jais exaone4 trillion "
    "granite-docling",
    Pre((r"\p{N}", rx.GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    Pre((rx.LLAMA3,), whole_words=True, add_bos=True): "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 "
    "lfm2",
    Pre((rx.LLAMA3,)): "dbrx smaug-bpe",
    Pre(rx.MINICPM5, whole_words=True): "minicpm5",
    Pre((rx.QWEN2,)): "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    Pre((rx.QWEN35,)): "qwen35",
    Pre((rx.TEKKEN,), whole_words=True, add_bos=True): "tekken",
    Pre((rx.GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    Pre(rx.DEEPSEEK3): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    Pre(rx.DEEPSEEK_CODER): "deepseek-coder",
    Pre(rx.FALCON): "falcon",
    Pre((rx.BAILING,)): "bailingmoe bailingmoe2 llada-moe",
    Pre((rx.SEED,)): "seed-coder",
}
PRE = {name: pre for pre, names in _KINDS.items() for name in names.split()}
