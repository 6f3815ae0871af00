"""The contenders of `infer_cpu`: each maker returns a function of a prompt and a count.

It answers (prefill seconds, decode seconds, the greedy tokens). Prefill ends with the first token known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

OURS = "jaxattn"
Answer = Callable[[list[int], int], tuple[float, float, list[int]]]
THREADS = len(os.sched_getaffinity(0))


def ours(dtype: str, files: dict[str, str], room: int) -> Answer:
    """The library's own prefill and decode loop, as `python -m jaxattn.generate` runs them."""
    from pathlib import Path

    from jaxattn.text import load

    assert dtype in ("float32", "bfloat16")
    loaded = load(Path(files["ours"]), dtype=dtype).prepared()

    def answer(prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        prefill, decode, made = timed(loaded.model, loaded.params, np.asarray([prompt], np.int32), count, room)
        return prefill, decode, made[0].tolist()

    return answer


def timed(model: Any, variables: Any, tokens: np.ndarray, count: int, room: int) -> tuple[float, float, np.ndarray]:
    """Seconds of reading prompts [B, T] and of writing `count` greedy tokens behind each, and these [B, count].

    Args:
      variables: what `jaxattn.decoding_variables` made of the model's parameters.
      room: tokens that are held at most.
    """
    import jax
    import jax.numpy as jnp

    from jaxattn import _generate as generation

    keys = jax.random.split(jax.random.key(0), len(tokens))
    start = time.perf_counter()
    space = generation.room_for(room + generation.BLOCK)
    cursor = generation.prefill(model, variables, tokens, np.full(len(tokens), tokens.shape[1]), space, keys)
    jax.block_until_ready(cursor)
    middle = time.perf_counter()
    made: list[np.ndarray] = []
    while generation.BLOCK * len(made) < count:
        new, _, cursor = generation.decode_block(
            model, generation.GREEDY, (), generation.BLOCK, variables, cursor, jnp.int32(0)
        )
        made.append(np.asarray(new))
    return middle - start, time.perf_counter() - middle, np.concatenate(made, axis=1)[:, :count]


def transformers(dtype: str, files: dict[str, str], room: int) -> Answer:
    """AutoModelForCausalLM in eager mode, SDPA, its own growing cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(files["hf"], dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def answer(prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        made = [int(out.logits[0, -1].argmax())]
        middle = time.perf_counter()
        for _ in range(count):
            out = model(torch.tensor([made[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            made.append(int(out.logits[0, -1].argmax()))
        return middle - start, time.perf_counter() - middle, made[:count]

    return answer


def _torch(dtype: str, files: dict[str, str], room: int, compiled: bool) -> Answer:
    """A plain decoder with a static cache (`torch_llama`)."""
    from pathlib import Path

    import torch

    from jaxattn.text import load
    from scripts.bench.torch_llama import Decoder

    torch.set_num_threads(THREADS)
    loaded = load(Path(files["ours"]))
    cfg = loaded.model
    assert cfg.tie_embeddings
    assert cfg.rope is not None
    sizes: dict[str, Any] = {
        "layers": cfg.num_layers, "heads": cfg.num_heads, "kv_heads": cfg.kv_heads, "head_dim": cfg.head_dim,
        "eps": cfg.norm_eps, "rope_base": cfg.rope_base,
    }  # fmt: skip
    model: Any = Decoder(sizes, loaded.params, room, getattr(torch, dtype))
    model = torch.compile(model, dynamic=False) if compiled else model

    @torch.inference_mode()
    def answer(prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        start = time.perf_counter()
        logits = model(torch.tensor([prompt]), torch.arange(len(prompt)), len(prompt))
        made = [int(logits[0].argmax())]
        middle = time.perf_counter()
        for at in range(len(prompt), len(prompt) + count):
            logits = model(torch.tensor([made[-1:]]), torch.tensor([at]), room)  # one shape: the mask hides the rest
            made.append(int(logits[0].argmax()))
        return middle - start, time.perf_counter() - middle, made[:count]

    return answer


def torch_eager(dtype: str, files: dict[str, str], room: int) -> Answer:
    return _torch(dtype, files, room, compiled=False)


def torch_compiled(dtype: str, files: dict[str, str], room: int) -> Answer:
    return _torch(dtype, files, room, compiled=True)


def llama_cpp(dtype: str, files: dict[str, str], room: int) -> Answer:
    """llama.cpp through llama-cpp-python, the prompt in one batch."""
    import llama_cpp as library

    model = library.Llama(
        files["gguf"], n_ctx=room + 64, n_batch=512, n_ubatch=512, n_threads=THREADS, n_threads_batch=THREADS,
        verbose=False,
    )  # fmt: skip

    def answer(prompt: list[int], count: int) -> tuple[float, float, list[int]]:
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        made = [model.sample(temp=0.0)]
        middle = time.perf_counter()
        for _ in range(count):
            model.eval(made[-1:])
            made.append(model.sample(temp=0.0))
        return middle - start, time.perf_counter() - middle, made[:count]

    return answer


MAKERS: dict[str, Callable[[str, dict[str, str], int], Answer]] = {
    OURS: ours,
    "transformers": transformers,
    "torch eager": torch_eager,
    "torch.compile": torch_compiled,
    "llama.cpp": llama_cpp,
}
