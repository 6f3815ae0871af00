"""How llama.cpp cuts text before byte-level merges, by the name a GGUF file gives in `tokenizer.ggml.pre`.

Every expression cuts the pieces that the one before it left. Where llama.cpp writes an expression otherwise than the
original tokenizer.json did (letters by "not a to z" in tekken and gpt-4o), its writing counts: a GGUF file is what
llama.cpp makes of it.
"""

from __future__ import annotations

import dataclasses

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"
)
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _cased(numbers: str, after: str = "") -> str:
    words = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{u}{_LOWER}{l}{after}" for u, l in (("*", "+"), ("+", "*"))]
    return "|".join([*words, numbers, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _ENDS])


_ASCII = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_BAILING = _QWEN2.replace(_CONTRACTIONS, "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])").replace(
    r"\s*[\r\n]+", r"\s*[\r\n]"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    rf"{_ASCII}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}",
)


@dataclasses.dataclass(frozen=True)
class Pre:
    """Expressions; whether a piece that is a token stays whole though no merge reaches it; whether BOS is usual."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_gpt2 = Pre((_GPT2,))
_digits = Pre((r"\p{N}", _GPT2))
_llama3 = Pre((_LLAMA3,), whole_words=True, add_bos=True)
_qwen2 = Pre((_QWEN2,))
_gpt4o = Pre((_cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))
_KINDS: dict[Pre, str] = {
    Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
    _gpt2: "gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum mpt olmo jais exaone4 trillion granite-docling",
    _digits: "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    _llama3: "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    Pre((_LLAMA3,)): "dbrx smaug-bpe",
    Pre((r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), whole_words=True): "minicpm5",
    _qwen2: "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    Pre((_QWEN35,)): "qwen35",
    Pre((_cased(r"\p{N}"),), whole_words=True, add_bos=True): "tekken",
    _gpt4o: "gpt-4o llama4 kanana2 talkie minimax-m2",
    Pre(_DEEPSEEK3): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    Pre(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")): "deepseek-coder",
    Pre((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): "falcon",
    Pre(
        (
            _QWEN2.replace(_CONTRACTIONS, "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])").replace(
                r"\s*[\r\n]+", r"\s*[\r\n]"
            ),
        )
    ): ("bailingmoe bailingmoe2 llada-moe"),
    Pre((_QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+"),)): "seed-coder",
}
PRE = {name: pre for pre, names in _KINDS.items() for name in names.split()}
EXPRESSIONS = frozenset(expression for pre in PRE.values() for expression in pre.expressions)
