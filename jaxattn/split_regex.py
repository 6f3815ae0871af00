"""Expressions by which known tokenizers cut text before their merges.

They need a number of steps that grows as the text does, so the library's limit of 10,000,000 is out of reach for texts
of `QUIET` characters; an unknown expression may need any number, and the library panics at the limit.
"""

from __future__ import annotations

QUIET = 2 << 20  # characters

CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # as tokenizer.json files have them
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"


def cased(numbers: str, after: str, upper: str, lower: str) -> str:
    """Words of capitals before small letters, as tekken and gpt-4o cut them."""
    words = [rf"[^\r\n\p{{L}}\p{{N}}]?{upper}{u}{lower}{l}{after}" for u, l in (("*", "+"), ("+", "*"))]
    return "|".join([*words, numbers, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _ENDS])


_LLAMA_CPP = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_ORIGINAL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = cased(r"\p{N}", "", *_LLAMA_CPP)
GPT4O = cased(r"\p{N}{1,3}", f"{CONTRACTIONS}?", *_LLAMA_CPP)
_ASCII = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
BAILING = QWEN2.replace(CONTRACTIONS, "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])").replace(r"\s*[\r\n]+", r"\s*[\r\n]")
SEED = QWEN2.replace(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}\r\n]+")
DIGITS, TRIPLES = r"\p{N}+", "[0-9][0-9][0-9]"
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, TRIPLES)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, TRIPLES)
MINICPM5 = (r"\p{N}{1,3}", LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+"))
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    rf"{_ASCII}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}",
)
_ALL = (GPT2, LLAMA3, QWEN2, QWEN35, TEKKEN, GPT4O, BAILING, SEED, *DEFAULT, *FALCON, *MINICPM5, *DEEPSEEK_CODER)
_ALL += (*DEEPSEEK3, cased(r"\p{N}", "", *_ORIGINAL), cased(r"\p{N}{1,3}", f"{CONTRACTIONS}?", *_ORIGINAL))
KNOWN = frozenset(writing for e in _ALL for writing in (e, e.replace(CONTRACTIONS, _SHORT)))
QWEN2_SPLIT = QWEN2.replace(CONTRACTIONS, _SHORT)
