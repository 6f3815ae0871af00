"""What a budget of keys costs a real model: its loss behind a long prompt and its needles, against choosing by lot.

    python -m scripts.reproduce.policies CKPT --text FILE [--length 2048] [--only h2o,tidal] [--policy 'NAME=TEXT']

CKPT is a converted instruct model and FILE a long text, such as SmolLM2-135M-Instruct and a book. For every policy and
budget: the mean loss of the last tokens of windows of the text, read one by one behind the rest as a prompt; and how
many five-digit numbers, hidden at even depths of the text under the model's chat template, it gives back greedily,
question in the prompt, answer token by token. MInference's budget is of keys that a prompt reads, half as columns and
half as diagonals. A policy of your own takes part by --policy, with {budget} and {half} in its text. Rows that the
result holds for the same setup are not measured again, so that policies can be added. Exits 1 if an expectation fails,
at every budget of at most a quarter of the length:

  all                 a lower loss than the same budget chosen by lot, which keeps the first token too; MInference,
                      whose budgets are not what it reads, than lots that read as much of the prompt
  tidal               more digits of the numbers than by lot, over all budgets
  h2o                 a lower loss than a window of the same budget
  all                 at a budget of a quarter of the length within 0.1 nats of dense
  tidal               above the second choosing layer its lists hold more of a layer's own top keys than the first's
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.needles import DIGITS, NUMBER, frame
from evals.text_file import read_text_file
from jaxattn.analysis.capture import look
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, DataError
from jaxattn.models import ModelConfig
from jaxattn.nn.decoding import variables_of
from jaxattn.policies import cost
from jaxattn.policies.report import measured
from jaxattn.reader import hidden_one_by_one, scores
from jaxattn.text import Loaded, load
from scripts.outputs import folder_to_write
from scripts.reproduce import _study as study

DENSE = "dense"
POLICIES = {
    "h2o": "h2o(heavy={half}, recent={half})",
    "h2o by lot": "h2o(heavy={half}, recent={half}, by='lots')",
    "window": "h2o(heavy=0, recent={budget})",
    "tidal": "tidal(first=2, again=12, tokens={budget})",
    "tidal by lot": "tidal(first=2, again=12, tokens={budget}, by='lots')",
    "minference": "minference(vertical={half}, slash={half}, sinks=16, near=16, block=16)",
    "minference by lot": "minference(vertical={half}, slash={half}, sinks=16, near=16, block=16, by='lots')",
}
CONTROLS = {"h2o": ("h2o by lot", "window"), "tidal": ("tidal by lot",), "minference": ("minference by lot",)}
BY_PROMPT = "minference"
FIRST, AGAIN, LISTED = 2, 12, 256  # of the recall by layer; SmolLM2's mean is largest for again=12 and 15
QUERIES = 32
ASKED, SAID = NUMBER
PAPER = (
    "H2O: 20 % of the cache keeps accuracy near the full one on OPT and LLaMA, a window alone collapses. TidalDecode, "
    "needles found by Llama-3-8B at 10K with budgets 32 / 64 / 128 / 256 / 512: 88 / 98 / 100 / 100 / 100 %."
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rows [n, length + 1] of one batch: windows of the text, and behind them chats that end in digits."""

    rows: np.ndarray
    counts: np.ndarray
    """[n], tokens of a row."""
    windows: int
    prefill: int
    """Tokens that are read as a prompt, of every row."""


def material(loaded: Loaded, text: str, *, length: int, answer: int, windows: int, needles: int) -> Measured:
    """Windows at even distances in the text, and as many chats as `needles` about the text around other places.

    Raises:
      DataError: the text is too short.
    """
    ids = np.asarray(loaded.tokenizer.encode(text), np.int32)
    count, prefill = windows + needles, length - answer
    if len(ids) < count * (length + 1):
        raise DataError(f"the text has {len(ids)} tokens but {count} times {length + 1} are read: give a longer one.")
    starts = (np.arange(count) * ((len(ids) - length - 1) / max(1, count - 1))).astype(int)
    rows = np.stack([ids[start : start + length + 1] for start in starts])
    counts, rng = np.full(count, length + 1), np.random.default_rng(0)
    encode = lambda part: loaded.tokenizer.encode(part, add_special_tokens=False)
    front, end = frame(loaded, ASKED, chat=True)
    for n, row in enumerate(rows[windows:]):
        number = "".join(map(str, rng.integers(1, 10, DIGITS)))
        needle, said = encode(f" {SAID.format(number)}."), encode(SAID.format(number))
        hay = row[: prefill - len(front) - len(end) - len(needle)].copy()
        at = int(len(hay) * (n + 0.5) / needles)
        whole = [*front, *hay[:at], *needle, *hay[at:], *end, *said]
        row[:], counts[windows + n] = 0, len(whole)
        row[: len(whole)] = whole
    return Measured(rows, counts, windows, prefill)


def measure(loaded: Loaded, policy: str, data: Measured) -> dict[str, float]:
    """Mean loss (nats) of the windows' answers, the shares of digits and of whole numbers that are right, and what it
    cost: megabytes held, and the shares of keys that a new token and a prompt read."""
    model, variables = dataclasses.replace(loaded.model, policy=policy), variables_of(loaded.params)
    tokens, targets, counted = data.rows[:, :-1], data.rows[:, 1:], {}
    look = lambda states: counted.update(measured(model, states))
    hidden = hidden_one_by_one(model, variables, tokens, data.counts - 1, prefill=data.prefill, look=look)
    hidden = hidden[:, data.prefill :]
    logp, best = map(np.asarray, scores(model, variables, hidden, jnp.asarray(targets[:, data.prefill :])))
    losses = -logp[: data.windows].astype(np.float64)
    if not np.isfinite(losses).all():
        raise DataError(f"policy {policy} gives no numbers on this text.")
    # All digits are given back greedily exactly where each is the likeliest behind those before it
    ends = data.counts[data.windows :, None] - 1 - data.prefill - DIGITS + np.arange(DIGITS)
    pick = lambda x: np.take_along_axis(x[data.windows :], ends, axis=1)
    digits = pick(best) == pick(targets[:, data.prefill :])
    return {
        "loss": float(losses.mean()),
        "perplexity": math.exp(losses.mean()),
        "digits": float(digits.mean()),
        "needles": float(digits.all(axis=1).mean()),
        **_cost(model, tokens.shape[1]),
        "prompt": counted.get("prompt_density", 1.0),
    }


def recall(loaded: Loaded, row: np.ndarray, *, tokens: int) -> np.ndarray:
    """[L, L]: of the `tokens` keys with the largest scores in layer l, the share that layer s has chosen, at [s, l].

    The mean over the last queries of a row and all heads, by the scores of the dense model (TidalDecode's recall).
    """
    views = look(loaded.model, loaded.params, jnp.asarray(row[None])).attention
    chosen = []
    for view in views:
        q, k = view.queries[0, -QUERIES:], view.keys[0]
        s = jnp.einsum("tkgd,skd->tkgs", q.reshape(len(q), k.shape[1], -1, q.shape[-1]), k)
        seen = jnp.arange(len(k)) <= len(k) - len(q) + jnp.arange(len(q))[:, None]
        top = jax.lax.top_k(jnp.where(seen[:, None, None], s, -jnp.inf), tokens)[1]
        chosen.append(np.asarray(jax.nn.one_hot(top, len(k), dtype=bool).any(-2)).reshape(-1))
    every = np.stack(chosen).astype(np.float32)
    return every @ every.T / (every[0].sum())


def by_again(found: np.ndarray, first: int) -> dict[int, float]:
    """Mean recall of the layers that read lists, for every layer that may choose again; `first`: no second choice."""
    means = {}
    for again in range(first, len(found)):
        listed = [layer for layer in range(first + 1, len(found)) if layer != again]
        means[again] = float(np.mean([found[again if layer > again else first, layer] for layer in listed]))
    return means


def _cost(model: ModelConfig, length: int) -> dict[str, float]:
    """Megabytes that a text of `length` tokens takes, and the share of them that a new token reads."""
    sites = [model.site(layer) for layer in range(model.num_layers)]
    costs = [cost(model.keeping, site, length=length, capacity=length + 1) for site in sites]
    return {"held (MB)": sum(c.held for c in costs) / 1e6, "read": float(np.mean([c.share for c in costs]))}


def expect(rows: list[study.Row], length: int) -> list[study.Expectation]:
    """The acceptance lines that the policies at hand can be judged by."""
    value = lambda policy, budget, key: study.select(rows, key, policy=policy, budget=budget)[0]
    has = lambda policy: {row["budget"] for row in rows if row["policy"] == policy and row["budget"] <= length // 4}
    out = []
    for policy, controls in CONTROLS.items():
        for control in controls:
            budgets = sorted(has(policy) & has(control))
            if policy == BY_PROMPT:
                out += _at_equal_reading(rows, policy, control, budgets)
            elif budgets:
                gaps = [value(control, b, "loss") - value(policy, b, "loss") for b in budgets]
                found = ", ".join(f"{gap:+.3f} at {b}" for b, gap in zip(budgets, gaps, strict=True))
                out.append(study.Expectation(f"{policy}: a lower loss than {control}", found, min(gaps) > 0))
    budgets = sorted(has("tidal") & has("tidal by lot"))
    if budgets:
        ours, theirs = ([value(p, b, "digits") for b in budgets] for p in ("tidal", "tidal by lot"))
        pairs = zip(budgets, ours, theirs, strict=True)
        found = ", ".join(f"{a:.0%} against {b:.0%} at {n}" for n, a, b in pairs)
        text = "tidal: more of the numbers' digits than by lot, over all budgets"
        out.append(study.Expectation(text, found, sum(ours) > sum(theirs)))
    for policy in CONTROLS:
        if length // 4 in has(policy) and any(row["policy"] == DENSE for row in rows):
            gap = value(policy, length // 4, "loss") - study.select(rows, "loss", policy=DENSE)[0]
            text = f"{policy}: within 0.1 nats of dense at a budget of {length // 4}"
            out.append(study.Expectation(text, f"{gap:+.3f}", gap < 0.1))
    return out


def _at_equal_reading(rows: list[study.Row], policy: str, control: str, budgets: list[int]) -> list[study.Expectation]:
    """Against the control's loss where it reads as much of the prompt, between two of its budgets."""
    pick = lambda name: sorted((row["prompt"], row["loss"]) for row in rows if row["policy"] == name)
    theirs = np.array(pick(control))
    ours = [(read, loss) for read, loss in pick(policy) if budgets and theirs[0, 0] <= read <= theirs[-1, 0]]
    if not ours:
        return []
    gaps = [float(np.interp(read, *theirs.T)) - loss for read, loss in ours]
    found = ", ".join(f"{gap:+.3f} at {read:.1%}" for (read, _), gap in zip(ours, gaps, strict=True))
    text = f"{policy}: a lower loss than {control} that reads as much of the prompt"
    return [study.Expectation(text, found, min(gaps) > 0)]


def expect_recall(layers: list[study.Row]) -> list[study.Expectation]:
    """Choosing again helps the layers above."""
    above = [row for row in layers if row["layer"] > AGAIN]
    alone, again = (float(np.mean([row[f"by layer {n}"] for row in above])) for n in (FIRST, AGAIN))
    text = f"top {LISTED} of the layers above {AGAIN}: more in the lists of {AGAIN} than of {FIRST}"
    return [study.Expectation(text, f"{again:.2f} against {alone:.2f}", again > alone)]


def draw(rows: list[study.Row], layers: list[study.Row], left: Any, right: Any, last: Any) -> None:
    """Loss and needles against the budget, dense as a line across; and what lists of other layers hold."""
    for key, color in ((f"by layer {FIRST}", "#767676"), (f"by layer {AGAIN}", "#0072b2")):
        last.plot([row["layer"] for row in layers], [row[key] for row in layers], ".-", color=color, label=key)
    last.set(xlabel="layer", ylabel=f"recall of its top {LISTED}", ylim=(0, 1.04))
    last.legend()
    names = [name for name in dict.fromkeys(row["policy"] for row in rows) if name != DENSE]
    for name, color in zip(names, study.COLORS, strict=False):
        mine = sorted((row for row in rows if row["policy"] == name), key=lambda row: row["budget"])
        style = {"color": color, "ms": 4, "ls": "--" if "by lot" in name else "-", "label": name}
        for axes, key in ((left, "loss"), (right, "digits")):
            axes.plot([row["budget"] for row in mine], [row[key] for row in mine], "o", **style)
    for row in rows:
        if row["policy"] == DENSE:
            for axes, key in ((left, "loss"), (right, "digits")):
                axes.axhline(row[key], color="#767676", lw=0.9, label=DENSE if axes is left else None)
    ticks = sorted({row["budget"] for row in rows if row["policy"] != DENSE})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_xlabel("budget (tokens)")
    left.set_ylabel("loss (nats per token)")
    right.set(ylabel="digits given back", ylim=(-0.04, 1.04))
    left.legend()


def own_policies(texts: list[str]) -> dict[str, str]:
    """NAME=TEXT, each with {budget} or {half} in the text.

    Raises:
      ConfigError: one is not of this form.
    """
    found = {}
    for text in texts:
        name, _, policy = text.partition("=")
        if not name or not ("{budget}" in policy or "{half}" in policy):
            raise ConfigError(f"--policy is {text!r} but must be NAME=TEXT with {{budget}} or {{half}} in the text.")
        found[name.strip()] = policy.strip()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reproduce.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint with a chat template")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt and its answer (default 2048)")
    parser.add_argument("--answer", type=int, default=128, help="tokens of a window read one by one (default 128)")
    parser.add_argument("--windows", type=int, default=2, help="windows of the text (default 2)")
    parser.add_argument("--needles", type=int, default=4, help="hidden numbers (default 4)")
    parser.add_argument("--budgets", default="64,128,256,512", help="tokens (default 64,128,256,512)")
    parser.add_argument("--only", help="some of the policies, by name")
    parser.add_argument("--policy", action="append", default=[], metavar="NAME=TEXT", help="one more; may be repeated")
    parser.add_argument("--out", type=Path, default=study.RESULTS, help="where the table and the plot go")
    args = parser.parse_args()
    folder_to_write(args.out)
    try:
        budgets = sorted({int(word) for word in args.budgets.split(",")})
    except ValueError:
        raise ConfigError(f"--budgets is {args.budgets!r} but must be numbers like 64,256.") from None
    if not 1 <= args.answer < args.length:
        raise ConfigError(f"--answer is {args.answer} but must be from 1 to {args.length - 1}, below --length.")
    own = own_policies(args.policy)
    wanted = study.pick(list(POLICIES | own), args.only, str)
    text = read_text_file(args.text)
    loaded = load(args.checkpoint).prepared(consume=True)
    sizes = {"length": args.length, "answer": args.answer, "windows": args.windows, "needles": args.needles}
    data = material(loaded, text, **sizes)
    name = "policies" if args.length == 2048 else f"policies_{args.length}"
    setup = {"model": args.checkpoint.name, "text": args.text.name, **sizes}
    todo = [(DENSE, args.length, "dense")]
    filled = lambda text, n: text.replace("{budget}", str(n)).replace("{half}", str(n // 2))
    todo += [(policy, n, filled((POLICIES | own)[policy], n)) for n in reversed(budgets) for policy in wanted]
    ours = lambda row: filled(POLICIES.get(row["policy"], row["call"]), row["budget"]) == row["call"]
    rows = [row for row in study.known_rows(args.out / f"{name}.json", setup) if ours(row)]  # not of other options
    for policy, budget, call in todo:
        if any(row["call"] == call for row in rows):
            continue
        rows.append({"policy": policy, "budget": budget, "call": call, **measure(loaded, call, data)})
        print(json.dumps(rows[-1]), flush=True)
        study.write_rows(args.out / f"{name}.json", rows, setup=setup)
    order = [DENSE, *POLICIES]
    place = lambda row: (order.index(row["policy"]) if row["policy"] in order else len(order), row["policy"])
    rows.sort(key=lambda row: (*place(row), row["budget"]))
    layers = _recalled(args.out / f"{name}_recall.json", setup, args.checkpoint, data)
    study.save_figure(args.out / f"{name}.png", 11.0, 3.2, 3, lambda *axes: draw(rows, layers, *axes))
    columns = ("policy", "budget", "loss", "perplexity", "needles", "digits", "prompt", "read", "held (MB)")
    return study.finish(
        name,
        args.out,
        title="Budgets of keys: loss and needles",
        setup=setup,
        rows=rows,
        table=study.markdown(rows, columns, ("policy", "budget")),
        expectations=[*expect(rows, args.length), *expect_recall(layers)],
        paper=PAPER,
    )


def _recalled(path: Path, setup: dict[str, Any], checkpoint: Path, data: Measured) -> list[study.Row]:
    """A row for every layer behind `FIRST`, measured once and kept."""
    if layers := study.known_rows(path, setup):
        return layers
    found = recall(load(checkpoint), data.rows[0, :-1], tokens=LISTED)  # maps are of parameters as trained
    names = f"by layer {FIRST}", f"by layer {AGAIN}"
    held = lambda n: (float(found[s, n]) for s in (FIRST, AGAIN if n >= AGAIN else FIRST))
    layers = [{"layer": n, **dict(zip(names, held(n), strict=True))} for n in range(FIRST, len(found))]
    study.write_rows(path, layers, setup=setup, mean_by_again=by_again(found, FIRST))
    return layers


if __name__ == "__main__":
    run_cli(main)
