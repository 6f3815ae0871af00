"""`python -m tests.convert.record_llama_cpp`: run the cases of `gguf_models` in llama.cpp and keep its logits.

Needs the package cyllama, whose wheel holds llama.cpp (and no more of this project than numpy and gguf). A case that
llama.cpp refuses or dies of is kept as such; each runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.convert.gguf_models import CASES, IDS, PLACES, SHOWN, write

FILE = Path(__file__).with_name("llama_cpp.json")


def run(path: Path) -> Any:
    """Logits [T, N] in f32, without fused attention, with caches in f32; or why not."""
    from cyllama.llama import llama_cpp

    llama_cpp.set_log_callback(lambda *_: None)
    how = llama_cpp.LlamaModelParams()
    how.n_gpu_layers, how.use_extra_bufts = 0, False
    try:
        model = llama_cpp.LlamaModel(str(path), how, verbose=False)
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = 64
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = params.flash_attn_type = 0  # f32, f32, off
        context = llama_cpp.LlamaContext(model, params, False)
    except Exception:  # noqa: BLE001 - the binding raises the base class
        return "refused"
    batch = llama_cpp.LlamaBatch(n_tokens=len(IDS), embd=0, n_seq_max=1)
    for i, token in enumerate(IDS):
        batch.add(int(token), i, [0], True)
    context.decode(batch)
    return np.stack([np.asarray(context.get_logits_ith(i), np.float32) for i in range(len(IDS))])


def apart(path: Path) -> Any:
    """`run` in a child, because llama.cpp ends the process where it asserts."""
    read, sent = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with os.fdopen(sent, "wb") as out:
            pickle.dump(run(path), out)
        os._exit(0)
    os.close(sent)
    with os.fdopen(read, "rb") as source:
        raw = source.read()
    os.waitpid(child, 0)
    return pickle.loads(raw) if raw else "died"


def main() -> None:
    from cyllama.llama import llama_cpp

    os.environ["GGML_NO_BACKTRACE"] = "1"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for (arch, name), case in CASES.items():
            out = apart(write(Path(folder) / "case.gguf", arch, **case))
            kept = out if isinstance(out, str) else [[round(float(x), 5) for x in out[t, :SHOWN]] for t in PLACES]
            found[f"{arch}: {name}"] = kept
            print(f"{arch}: {name}: {kept if isinstance(kept, str) else 'logits'}")
    about = {"ggml": llama_cpp.ggml_version(), "commit": llama_cpp.ggml_commit(), "package": "cyllama 0.7.0"}
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in {"about": about, **found}.items()
    )
    FILE.write_text("{\n" + lines + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
