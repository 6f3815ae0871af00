"""`python -m convert.verify SRC DST`: does the converted checkpoint compute what the source computes?

The source runs in transformers (torch, f32, on the CPU), ours in JAX, on real prompts. Printed per prompt: the largest
difference of a logit, KL(source || ours) in nats, the share of positions whose top-1 and whose five likeliest tokens
agree; then whether token ids and chat renderings are those of transformers. If the largest difference exceeds
--tolerance, the first prompt is followed layer by layer to where it begins. Whatever differs, the command exits 1.
Needs the extra `verify` (torch and transformers).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from convert.sources import Folder, Gguf, open_source
from convert.verify_tokens import compare
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, UserError
from jaxattn.hf_tokenizer import has_tokenizer
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.places import SIDE
from jaxattn.runs.load import load_params, read_config
from jaxattn.tokenizer import read_tokenizer

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Q: Which planet is the largest in the solar system?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "Der schnelle braune Fuchs springt über den faulen",
    "SELECT name, COUNT(*) FROM orders GROUP BY",
    "Water freezes at 0 degrees and boils at",
)
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two sets of logits [T, N] are apart."""

    max_abs: float
    kl: float
    top1: float
    top5: float

    @classmethod
    def of(cls, theirs: np.ndarray, ours: np.ndarray) -> Agreement:
        log_p, log_q = (np.asarray(jax.nn.log_softmax(jnp.asarray(x, jnp.float32))) for x in (theirs, ours))
        top = lambda x: np.sort(np.argpartition(-x, min(5, x.shape[-1] - 1), axis=-1)[:, :5], axis=-1)
        return cls(
            max_abs=float(np.abs(theirs - ours).max()),
            kl=float(np.sum(np.exp(log_p) * (log_p - log_q), -1).mean()),
            top1=float(np.mean(theirs.argmax(-1) == ours.argmax(-1))),
            top5=float(np.mean(np.all(top(theirs) == top(ours), axis=-1))),
        )


class Oracle:
    """The source in transformers.

    Raises:
      UserError: torch and transformers are not installed.
    """

    def __init__(self, source: Folder | Gguf) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(f"convert.verify needs {error.name}: pip install 'jaxattn[verify]'.") from error
        self.torch = torch
        call: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
        folder = source.path
        if isinstance(source, Gguf):
            folder, call["gguf_file"] = source.path.parent, source.path.name
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **call)
        except Exception as error:  # transformers raises whatever its parts raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"transformers cannot open {source.origin} ({type(error).__name__}: {reason}); nothing to compare with."
            ) from error
        self.model = model.eval()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """[T, N] for ids [T]."""
        with self.torch.no_grad():
            return self.model(self.torch.tensor(ids[None], dtype=self.torch.long)).logits[0].numpy()

    def layers(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The residual stream [T, E] after the embedding and after every layer, and the logits."""
        found, hooks = {}, []
        inner = self.model.model
        first = lambda out: out[0] if isinstance(out, tuple) else out
        keep = lambda name: lambda module, args, out: found.__setitem__(name, first(out)[0].detach().numpy())
        hooks.append(inner.embed_tokens.register_forward_hook(keep("embedding")))
        hooks += [layer.register_forward_hook(keep(f"layer {i}")) for i, layer in enumerate(inner.layers)]
        found["logits"] = self.logits(ids)
        for hook in hooks:
            hook.remove()
        return found


def our_layers(model: ModelConfig, params: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The same places in our model."""
    out: Any = Decoder(model).apply({"params": params}, jnp.asarray(ids[None]), mutable=["capture"])
    logits, seen = out
    blocks = {f"layer {i}": seen["capture"][f"layer_{i}"]["block_out"][0][0] for i in range(model.num_layers)}
    places = {"embedding": np.asarray(params["embed"])[ids], **blocks, "logits": logits[0]}
    return {name: np.asarray(value, np.float32) for name, value in places.items()}


def prompts_of(folder: Path, vocab: int, given: list[str]) -> list[tuple[str, np.ndarray]]:
    """Prompts as token ids; without a tokenizer, fixed random ids stand in for them.

    Raises:
      ConfigError: --prompt without a tokenizer.
      CheckpointError: there is one that cannot be read.
    """
    if has_tokenizer(folder / SIDE):
        tokenizer = read_tokenizer(folder / SIDE)
        rows = [(text, np.asarray(tokenizer.encode(text), np.int32)) for text in given or PROMPTS]
        if any(len(ids) == 0 for _, ids in rows):
            raise ConfigError("--prompt is empty and the tokenizer puts no start token there; give some text.")
        return rows
    if given:
        raise ConfigError(f"--prompt needs a tokenizer, and {folder / SIDE} has none.")
    rng = np.random.default_rng(0)
    return [(f"random tokens {i}", rng.integers(0, vocab, 32).astype(np.int32)) for i in range(8)]


def verify(src: str, dst: Path, *, prompts: list[str], tolerance: float, console: Console) -> bool:
    """Print the comparison; whether every prompt is within the tolerance, and tokens and chats are the same.

    Raises:
      UserError: source or checkpoint cannot be opened.
    """
    source = open_source(src)
    assert isinstance(source, Folder | Gguf)
    model = dataclasses.replace(read_config(dst).model, dtype="float32")
    params, _ = load_params(dst, read_config(dst))
    oracle = Oracle(source)
    run = jax.jit(lambda params, ids: Decoder(model).apply({"params": params}, ids))
    table = Table(
        "prompt", "tokens", "max |Δ logit|", "KL (nats)", "top-1 equal", "top-5 equal", title=f"{src} and {dst}"
    )
    worst, failed = 0.0, None
    chosen = prompts_of(dst, model.vocab_size, prompts)
    for text, ids in track(chosen, "comparing", console=console, transient=True):
        found = Agreement.of(oracle.logits(ids), np.asarray(run(params, jnp.asarray(ids[None])))[0])
        numbers = (f"{found.max_abs:.2e}", f"{found.kl:.2e}", f"{found.top1:.1%}", f"{found.top5:.1%}")
        table.add_row(repr(text)[:48], str(len(ids)), *numbers)
        worst = float(np.maximum(worst, found.max_abs))  # NaN is the worst of all
        if not found.max_abs <= tolerance and failed is None:
            failed = ids
    console.print(table)
    tokens = compare(source, dst / SIDE, prompts or list(PROMPTS))
    console.print(tokens.line, markup=False)
    if failed is None:
        console.print(f"equal: no logit differs by more than {worst:.2e} (tolerance {tolerance:g})")
        return tokens.same
    console.print(
        f"[bold]different[/bold]: logits differ by up to {worst:.2e} (tolerance {tolerance:g}); layer by layer:"
    )
    theirs, ours = oracle.layers(failed), our_layers(model, params, failed)
    steps = Table("after", "max |Δ|", "max |Δ| / max |source|")
    for name in theirs:
        gap, size = np.abs(theirs[name] - ours[name]).max(), np.abs(theirs[name]).max()
        steps.add_row(name, f"{gap:.2e}", f"{gap / size:.2e}")
    console.print(steps)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m convert.verify", description=__doc__)
    parser.add_argument("src", help="HuggingFace folder, .gguf file, or hub name")
    parser.add_argument("dst", type=Path, help="converted checkpoint")
    parser.add_argument("--prompt", action="append", default=[], help="compare on this text; may be repeated")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"largest difference of a logit (default {TOLERANCE:g})"
    )
    args = parser.parse_args()
    same = verify(args.src, args.dst, prompts=args.prompt, tolerance=args.tolerance, console=Console())
    return 0 if same else 1


if __name__ == "__main__":
    run_cli(main)
