"""The README's table of results; every figure in it is read from the file that the row links to.

python -m scripts.results_table            print it
python -m scripts.results_table --write    put it into README.md
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxattn.command import run_cli
from jaxattn.errors import UserError
from scripts.readme import table_command

ROOT = Path(__file__).parents[1]
MARK = "results"
STUDIES, BENCHES = "scripts/reproduce/results", "scripts/bench/results"
CPU = "2-core CPU"
OURS = "jaxattn"


class Row(NamedTuple):
    """Of the table: what a file says, from its contents, and what is linked to beside it."""

    file: str  # without suffix, of a JSON file
    says: Callable[[dict[str, Any]], str]
    links: tuple[str, ...] = ("md table", "png picture")
    device: str = CPU


def mean(rows: Iterable[dict[str, Any]], key: str, **where: Any) -> float:
    """Over the rows in which every one of `where` is so.

    Raises:
      UserError: there is none.
    """
    found = [row[key] for row in rows if all(row[k] == v for k, v in where.items())]
    if not found:
        raise UserError(f"no row has {where}: the README's sentence and its file have come apart.")
    return statistics.mean(found)


def over(rows: list[dict[str, Any]], rival: str, case: str) -> list[float]:
    """How many times as fast as a rival ours is, by the medians of the cases whose name begins so."""
    medians = [row["median_ms"] for row in rows if row["case"].startswith(case)]
    found = [times[rival] / times[OURS] for times in medians if rival in times]
    if not found:
        raise UserError(f"no case {case!r} has been measured against {rival}: the README's sentence has no figure.")
    return found


def by_round(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is, in the median over rounds."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def span(ratios: list[float], digits: int = 2) -> str:
    return f"{min(ratios):.{digits}f} to {max(ratios):.{digits}f}"


def passkey(data: dict[str, Any]) -> str:
    context, fetch = data["setup"]["trained at"], "landmark, 2 blocks"
    longest = max(row["length"] for row in data["rows"])
    found = 100 * mean(data["rows"], "digits", attention=fetch, length=longest)
    return (
        f"passkey at {longest // context} × the training length, 3 seeds: landmark with 2 blocks finds {found:.1f} % "
        "of digits, a window no more whole keys than chance"
    )


def length(data: dict[str, Any]) -> str:
    rows = data["rows"]
    most = max(row["times"] for row in rows)
    rise = lambda name: mean(rows, "loss", attention=name, times=most) - mean(rows, "loss", attention=name, times=1)
    return (
        f"loss up to {most} × the training length, 3 seeds: softplus rises by {rise('softplus, p = 15'):.2f} nats, "
        f"softmax + RoPE by {rise('softmax'):.2f}"
    )


def temperature(data: dict[str, Any]) -> str:
    rows, name = data["rows"], "selective_temperature"
    away = [
        mean(rows, "loss", attention="softmax", seed=seed) - mean(rows, "loss", attention=name, seed=seed)
        for seed in sorted({row["seed"] for row in rows})
    ]
    gain = f"{statistics.mean(away):.3f} nats ({min(away):.3f} to {max(away):.3f})"
    return f"selective temperature against softmax on text, {len(away)} paired seeds: {gain} lower"


def speed(data: dict[str, Any]) -> str:
    def share(attn: str) -> str:
        speeds = [row["tokens_per_s"] for row in data["rows"] if row["attention"] == attn and row["what"] == "training"]
        return f"{min(speeds) / max(speeds):.2f}"

    def slower(attn: str) -> str:
        times = [row["ms_per_token"] for row in data["rows"] if row["attention"] == attn and row["what"] == "decoding"]
        return f"{max(times) / min(times):.1f}"

    return (
        f"speed against length: training of lightning, linear and softmax attention at the slowest length "
        f"{share('lightning')}, {share('linear')} and {share('softmax')} of the fastest (1k to 32k tokens, softmax to "
        f"8k); a token decoded behind 16k tokens costs softmax {slower('softmax')} times and lightning "
        f"{slower('lightning')} times what it does at best"
    )


def streaming(data: dict[str, Any]) -> str:
    lines = {row["line"]: row for row in data["rows"] if "line" in row}
    rates = [row for row in data["rows"] if "cache" in row]
    ours, tokens = lines["4 + 252"], data["setup"]["tokens each"] // 1024

    def beside(name: str) -> str:
        """How many times our perplexity another line's is, in the last window that it has read."""
        theirs = lines[name]["by window"]
        gap = [a[len(a) - 1] - b[len(a) - 1] for a, b in zip(theirs, ours["by window"], strict=False)]
        return f"{math.exp(statistics.mean(gap)):.2g} ×"

    first, *others = (statistics.mean(x) for x in zip(*ours["by window"], strict=True))
    return (
        f"SmolLM2-135M reads {tokens}k tokens, 4 × its context, one by one through 4 sinks and 252 recent keys: no "
        f"2k of them lose more than {max(others) - first:.2f} nats against the first 2k; without sinks "
        f"{beside('0 + 256')} the perplexity, dense at twice the context {beside('dense')}; "
        f"{span([row['times'] for row in rates], 1)} × the tokens/s of a rebuilt window of "
        f"{min(row['cache'] for row in rates)} to {max(row['cache'] for row in rates)} keys"
    )


def budgets(data: dict[str, Any]) -> str:
    rows = {(row["policy"], row["budget"]): row for row in data["rows"]}
    length = data["setup"]["length"]
    most, least = length // 4, min(budget for policy, budget in rows if policy == "h2o")
    gap = lambda policy, budget: f"{rows[policy, budget]['loss'] - rows['dense', length]['loss']:+.2f}"
    beside = lambda policy, control, budget: f"{gap(policy, budget)} (by lot {gap(control, budget)})"
    return (
        f"SmolLM2-135M behind {length // 1024}k tokens, nats against dense: H2O with {least} tokens "
        f"{beside('h2o', 'h2o by lot', least)}, a window of {least} {gap('window', least)}; TidalDecode with {most} "
        f"{beside('tidal', 'tidal by lot', most)}; MInference reading {100 * rows['minference', most]['prompt']:.0f} % "
        f"of the prompt {gap('minference', most)}"
    )


def retrieval(data: dict[str, Any]) -> str:
    answers = [row for row in data["rows"] if row["phases"] == "answers" and row["by"] == "uniform"]
    digits = lambda which, heads: [r["digits"] for r in answers if r["which"] == which and r["heads"] == heads]
    tops = sorted({row["heads"] for row in answers if row["which"] == "first"})
    first = " and ".join(f"{100 * digits('first', heads)[0]:.0f} %" for heads in (tops[0], tops[-1]))
    drawn = f"{100 * min(digits('drawn', tops[-1])):.0f} %"
    return (
        f"SmolLM2-135M copies by {data['expectations'][0]['found'].replace('%', ' %')} of its heads: with the first "
        f"{tops[0]} and {tops[-1]} of them masked in its answers it gives back {first} of the digits that are hidden "
        f"in 1k tokens, with any of 5 × {tops[-1]} drawn ones {drawn} or more, with all "
        f"{100 * digits('none', 0)[0]:.0f} %"
    )


def train(data: dict[str, Any]) -> str:
    seconds = data["seconds_per_step"]
    ratio = lambda rival: f"{by_round(seconds[rival], seconds[OURS]):.2f}"
    return (
        f"training speed against PyTorch {release(data['torch'])}, f32, 10M parameters: "
        f"{ratio('torch.compile')} × torch.compile, {ratio('torch eager')} × eager"
    )


def release(version: str) -> str:
    """The first two numbers of a version."""
    return ".".join(version.split(".")[:2])


def inference(data: dict[str, Any]) -> str:
    torch = ("transformers", "torch eager", "torch.compile")

    def ratio(dtype: str, part: str, rivals: tuple[str, ...]) -> str:
        seconds = {name: found[part] for name, found in data["results"][dtype]["seconds"].items()}
        here = [name for name in rivals if name in seconds]
        if not here:
            return "–"
        best = min(here, key=lambda name: statistics.median(seconds[name]))
        return f"{by_round(seconds[best], seconds[OURS]):.2f} ×"

    pair = lambda dtype, part: f"{ratio(dtype, part, torch)} and {ratio(dtype, part, ('llama.cpp',))}"
    both = lambda part: f"{part} f32 {pair('float32', part)}, bf16 {pair('bfloat16', part)}"
    rivals = f"the best of PyTorch {release(data['versions']['torch'])} and against llama.cpp"
    return f"SmolLM2-135M against {rivals}: {both('decode')}; {both('prefill')}"


def serving(data: dict[str, Any]) -> str:
    found = data["results"].values()

    def values(start: str, show: Callable[[float], str]) -> str:
        return " and ".join(show(row["value"]) for of in found for row in of["bars"] if row["what"].startswith(start))

    times = lambda start: values(start, lambda value: f"{value:.2f} ×")
    size = values("memory", lambda size: f"{size / 1e9:.1f} GB")
    return (
        f"{data['model'].removesuffix('-Instruct')} on the server, {' and '.join(data['results'])}: one stream takes "
        f"{times('one stream')} `generate`'s time, a sampled one {times('one sampled')} a greedy one's, eight streams "
        f"give {times('8 streams')} one's tokens; {size} beside weights and caches "
        "(of the slots and of the prompt that is read) at most"
    )


def kernels(data: dict[str, Any]) -> str:
    rows, derived = data["rows"], {claim["claim"]: claim for claim in data["derived"]}
    torch = (span(over(rows, "torch SDPA", f"flash softmax {part}")) for part in ("forward", "backward"))
    flat = (derived[f"linear_scan {part}: time per token at 65536 over that at 1024 tokens"]["ratio"]
            for part in ("forward", "backward"))  # fmt: skip
    sparse, decoding = (over(rows, "flash, dense", op)[0] for op in ("block_sparse", "paged_decode"))
    return (
        f"kernels on a CPU: `flash` {span(over(rows, 'jax.nn xla', 'flash softmax'), 1)} × `jax.nn` (xla) at 2k to 8k "
        f"tokens, and against PyTorch's SDPA {next(torch)} × forward, {next(torch)} × backward; block-sparse attention "
        f"at 90 % {sparse:.0f} × dense at 16k, decoding from a sixteenth of 32k tokens {decoding:.0f} × dense, linear "
        f"attention {next(flat):.2f} (forward) and {next(flat):.2f} (backward) × the time per token at 64k as at 1k"
    )


def compiled_for_gpus(data: dict[str, Any]) -> str:
    dims = sorted({row["dim"] for row in data["rows"]})
    spilled = sum(kernel["spill_bytes"] > 0 for row in data["rows"] for kernel in row["kernels"])
    return (
        "the GPU kernels of every op compiled for an H100 without one, forward and backward, head dims "
        f"{', '.join(map(str, dims[:-1]))} and {dims[-1]}: {spilled or 'none'} of them spills registers; registers, "
        "shared memory, tensor-core and copy instructions; speed not measured (no GPU was at hand)"
    )


def compiled_for_tpus(data: dict[str, Any]) -> str:
    tokens = data["shape"]["length"] // 1024
    return (
        f"every kernel op compiled for a TPU without one, forward and backward at {tokens}k: memory, FLOPs, bytes; "
        "speed not measured"
    )


ROWS = (
    Row(f"{STUDIES}/sinks_bb", lambda _: "sinks on Bigram-Backcopy, 3 attentions × 3 seeds", ("md table",)),
    Row(
        f"{STUDIES}/sinks_all",
        lambda data: f"sinks on Bigram-Backcopy, all {len(data['rows'])} attentions, one seed",
    ),
    Row(
        f"{STUDIES}/mqar",
        lambda _: (
            "recall against decode state (MQAR), 3 seeds: BASED beats linear attention at equal state, Titans every "
            "linear one"
        ),
    ),
    Row(f"{STUDIES}/passkey", passkey),
    Row(f"{STUDIES}/length_extrapolation", length),
    Row(f"{STUDIES}/temperature", temperature),
    Row(f"{STUDIES}/constant_speed", speed),
    Row(f"{STUDIES}/streaming", streaming),
    Row(f"{STUDIES}/policies", budgets),
    Row(f"{STUDIES}/retrieval_heads", retrieval),
    Row(f"{BENCHES}/train_cpu", train, ("json JSON",)),
    Row(f"{BENCHES}/infer_cpu", inference, ("json JSON", "png picture")),
    Row(f"{BENCHES}/serve_cpu", serving, ("json JSON",)),
    Row(f"{BENCHES}/kernels_cpu", kernels),
    Row(f"{BENCHES}/aot_tpu_v5e", compiled_for_tpus, ("md table",), "–"),
    Row(f"{BENCHES}/aot_gpu", compiled_for_gpus, ("md table",), "–"),
)
UNMEASURED = ("sink-60m sink curves, softmax and sigmoid",)


def table(root: Path = ROOT) -> str:
    """Markdown.

    Raises:
      UserError: a study's expectations do not hold, so that a sentence about it may be wrong; or a figure is missing.
    """
    lines = ["| study | where | device |", "|---|---|---|"]
    for row in ROWS:
        data = json.loads((root / f"{row.file}.json").read_text("utf-8"))
        failing = [e["text"] for e in data.get("expectations", []) if not e["holds"]]
        if failing:
            raise UserError(f"{row.file}.json says that it does not hold: {failing[0]}: change the README's sentence.")
        links = ", ".join(f"[{what}]({row.file}.{suffix})" for suffix, what in map(str.split, row.links))
        lines.append(f"| {row.says(data)} | {links} | {row.device} |")
    lines += [f"| {study} | not measured (no GPU was at hand) | – |" for study in UNMEASURED]
    return "\n".join(lines)


def main() -> None:
    table_command(__doc__, MARK, table)


if __name__ == "__main__":
    run_cli(main)
