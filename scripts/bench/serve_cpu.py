"""One and several streams through the server against `jaxattn.generate` on this CPU, and the memory that it holds.

    python -m scripts.bench.serve_cpu [--dtype float32 bfloat16] [--rounds 5] [--out FILE.json]

The model is SmolLM2-135M-Instruct (`scripts.get`), or --checkpoint. `python -m jaxattn.serve` and a process that calls
`jaxattn.generate` are asked in turn for the same tokens behind the same prompts, the order reversed each round; their
texts must be the same before anything is timed. Then 1, 2, 4 and 8 clients read streams at once, and one samples.
Quote ratios: times on a shared machine mean little. Times are of whole requests, reading of the prompt included. The
server's memory is the most it held in the whole run, beside that of its weights and caches, those of the slots and the
one of the prompt that is read; pages of program files, which processes share and the system may drop, are also given
apart.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing as mp
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from jaxattn.command import run_cli
from jaxattn.errors import UserError, writing
from jaxattn.runs.rundir import result_environment, write_json_atomic
from scripts.bench.alive import alive
from scripts.bench.timing import ratio
from scripts.outputs import REMEDY, file_to_write

PROMPT, NEW, SLOTS, CONTEXT = 64, 128, 8, 2048
STREAMS = (1, 2, 4, 8)
SEED = 0
SPARE = 0.5e9  # bytes beside weights and caches
BARS = {  # how many times, or bytes, are good
    "one stream against generate": ("seconds", "at most", 1.2),
    "one sampled stream against a greedy one": ("seconds", "at most", 1.2),
    "8 streams against one": ("tokens/s", "at least", 4.0),
    "memory beside weights and caches": ("bytes", "at most", SPARE),
}


def generate_worker(folder: str, dtype: str, pipe: Connection) -> None:
    """Answers sizes first, then for each (prompt, count) the seconds and the new tokens' text; None ends it."""
    import jax

    import jaxattn
    from jaxattn.text import load
    from jaxattn.text_stream import TextStream

    assert dtype in ("float32", "bfloat16")
    loaded = load(Path(folder), dtype=dtype).prepared(consume=True)
    pipe.send({"vocabulary": loaded.model.vocab_size, **_sizes(loaded)})
    while (asked := pipe.recv()) is not None:
        prompt, count = asked
        start = time.perf_counter()
        found = jaxattn.generate(
            loaded.model, loaded.params, np.asarray([prompt], np.int32), max_new_tokens=count, key=jax.random.key(0),
            stop_tokens=loaded.stop_tokens,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        made = [t for t in found.tokens[0][: int(found.lengths[0])].tolist() if t not in loaded.stop_tokens]
        pipe.send(
            (seconds, int(found.lengths[0]), TextStream(loaded.tokenizer, prompt_ids=prompt).add(made, last=True))
        )


def _sizes(loaded: Any) -> dict[str, int]:
    """Bytes of the weights as they are decoded with, and of the caches of all slots and of a prompt."""
    import jax

    from jaxattn.serving import slots
    from jaxattn.serving.engine import room_of

    count = lambda tree: sum(x.size * x.dtype.itemsize for x in {id(x): x for x in jax.tree.leaves(tree)}.values())
    room = room_of(loaded.model, CONTEXT)
    states = jax.eval_shape(lambda v: slots.empty(loaded.model, SLOTS + 1, room, v), loaded.params).states
    return {"weights": count(loaded.params), "caches": count(states)}


class Server:
    """`python -m jaxattn.serve` as a process."""

    def __init__(self, folder: str, dtype: str) -> None:
        words = ["--port=0", f"--slots={SLOTS}", f"--context={CONTEXT}", f"--dtype={dtype}", "--name=bench"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxattn.serve", folder, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        self._place = urlsplit(self._process.stdout.readline().decode().strip())
        if not self._place.hostname:
            raise UserError("the server did not start; run python -m jaxattn.serve to see why.")

    def ask(self, prompt: list[int], count: int, temperature: float = 0.0) -> tuple[float, float, int, str]:
        """Seconds to the first text and to the end, tokens, and the text of a stream."""
        body = {"prompt": prompt, "max_tokens": count, "temperature": temperature, "seed": SEED, "stream": True}
        link = http.client.HTTPConnection(self._place.hostname or "", self._place.port, timeout=600)
        start, first, made, text = time.perf_counter(), 0.0, 0, []
        with contextlib.closing(link):
            link.request("POST", "/v1/completions", json.dumps({**body, "stream_options": {"include_usage": True}}))
            answer = link.getresponse()
            if answer.status != 200:
                raise UserError(f"the server answered {answer.status}: {answer.read(500)!r}.")
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise UserError(f"the server failed: {event['error']['message']}")
                first = first or time.perf_counter() - start
                text += [choice["text"] for choice in event["choices"]]
                made = event["usage"]["completion_tokens"] if event["usage"] else made
        return first, time.perf_counter() - start, made, "".join(text)

    def together(self, prompts: list[list[int]], count: int) -> float:
        """Tokens a second of streams that are read at once."""
        made = [0] * len(prompts)

        def one(index: int) -> None:
            made[index] = self.ask(prompts[index], count)[2]

        threads = [threading.Thread(target=one, args=(index,)) for index in range(len(prompts))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not all(made):
            raise UserError("a stream ended without its tokens; nothing is reported.")
        return sum(made) / (time.perf_counter() - start)

    def memory(self) -> dict[str, int]:
        """Bytes: the most that was resident, and what is now, by kind."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        names = {"peak": "VmHWM", "resident": "VmRSS", "own": "RssAnon", "program_files": "RssFile"}
        found = {name: re.search(rf"{key}:\s+(\d+) kB", text) for name, key in names.items()}
        return {name: int(match[1]) * 1024 for name, match in found.items() if match}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@contextlib.contextmanager
def generating(folder: str, dtype: str) -> Iterator[Connection]:
    """The process that calls `jaxattn.generate`."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=generate_worker, args=(folder, dtype, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        ours.send(None)
        process.join(20)
    finally:
        process.kill()


def measure(folder: str, dtype: str, rounds: int, prompt: int, new: int) -> dict[str, Any]:
    """All of one dtype."""
    with generating(folder, dtype) as pipe, contextlib.closing(Server(folder, dtype)) as server:
        with alive("generate"):
            sizes = pipe.recv()
        draw = np.random.default_rng(SEED)
        prompts = draw.integers(10, sizes.pop("vocabulary"), (max(STREAMS), prompt)).tolist()

        def generate(ids: list[int]) -> tuple[float, int, str]:
            with alive("generate"):
                pipe.send((ids, new))
                return pipe.recv()

        for ids in prompts[:2]:  # the first compiles
            (_, _, made, text), (_, count, own) = server.ask(ids, new), generate(ids)
            if (made, text) != (count, own):
                raise UserError(f"server and generate part in {dtype}: {text[:60]!r} against {own[:60]!r}.")
        server.ask(prompts[0], new, 1.0)
        server.together(prompts, new)
        seconds: dict[str, list[float]] = {name: [] for name in ("generate", "server", "sampled", "first")}
        streams: dict[int, list[float]] = {count: [] for count in STREAMS}
        for r in range(rounds):
            ids = prompts[r % len(prompts)]

            def served(ids: list[int] = ids) -> None:
                first, whole, *_ = server.ask(ids, new)
                seconds["first"].append(first)
                seconds["server"].append(whole)

            calls = [
                lambda ids=ids: seconds["generate"].append(generate(ids)[0]),
                served,
                lambda ids=ids: seconds["sampled"].append(server.ask(ids, new, 1.0)[1]),
            ]
            for call in calls if r % 2 == 0 else calls[::-1]:
                call()
            for count in STREAMS if r % 2 == 0 else STREAMS[::-1]:
                streams[count].append(server.together(prompts[:count], new))
            rates = "  ".join(f"{count} streams {found[-1]:.1f}" for count, found in streams.items())
            print(
                f"{dtype} round {r + 1}/{rounds}: generate {new / seconds['generate'][-1]:.1f} tok/s  {rates}",
                flush=True,
            )
        return {"seconds": seconds, "tokens_per_s": streams, "bytes": sizes | server.memory()}


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar beside what was measured."""
    seconds, streams, size = found["seconds"], found["tokens_per_s"], found["bytes"]
    beside = size["peak"] - size["weights"] - size["caches"]
    values = {
        "one stream against generate": ratio(seconds["server"], seconds["generate"]),
        "one sampled stream against a greedy one": ratio(seconds["sampled"], seconds["server"]),
        f"{STREAMS[-1]} streams against one": ratio(streams[STREAMS[-1]], streams[1]),
        "memory beside weights and caches": {"ratio": beside, "least": beside, "most": beside},
    }
    rows = []
    for name, (unit, sense, bar) in BARS.items():
        value = values[name]["ratio"]
        row = {"what": name, "of": unit, "value": value, "least": values[name]["least"], "most": values[name]["most"]}
        rows.append(row | {"bar": f"{sense} {bar:g}", "reached": value <= bar if sense == "at most" else value >= bar})
    return rows


def checkpoint(folder: Path) -> str:
    """SmolLM2 as a converted checkpoint."""
    from scripts.get import fetch

    subprocess.run([sys.executable, "-m", "convert.from_hf", str(fetch("smollm2")), str(folder / "ours")], check=True)
    return str(folder / "ours")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.serve_cpu", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=NEW, help="new tokens of an answer")
    parser.add_argument("--checkpoint", type=Path, help="another converted checkpoint or run of text")
    parser.add_argument("--out", type=Path, default=Path("scripts/bench/results/serve_cpu.json"))
    args = parser.parse_args()
    for name in ("rounds", "prompt", "new"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)} but must be at least 1.")
    file_to_write(args.out)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(args.checkpoint) if args.checkpoint else checkpoint(Path(folder))
        for dtype in args.dtype:
            results[dtype] = measure(model, dtype, args.rounds, args.prompt, args.new)
            results[dtype]["bars"] = judge(results[dtype])
    for dtype, found in results.items():
        rates = {count: statistics.median(rate) for count, rate in found["tokens_per_s"].items()}
        print(f"{dtype}: " + ", ".join(f"{count} streams {rate:.1f} tok/s" for count, rate in rates.items()))
        print("  memory: " + ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in found["bytes"].items()))
        for row in found["bars"]:
            verdict = "reached" if row["reached"] else "NOT reached"
            print(f"  {row['what']} ({row['of']}): {row['value']:.3g} ({row['least']:.3g} to {row['most']:.3g}), "
                  f"bar {row['bar']}: {verdict}")  # fmt: skip
    summary = {"model": args.checkpoint.name if args.checkpoint else "SmolLM2-135M-Instruct", "seed": SEED}
    summary |= {"prompt": args.prompt, "new": args.new, "slots": SLOTS, "context": CONTEXT}
    summary |= {"threads": len(os.sched_getaffinity(0)), "results": results, "environment": result_environment()}
    with writing(args.out, REMEDY):
        write_json_atomic(args.out, summary)
    return 0 if all(row["reached"] for found in results.values() for row in found["bars"]) else 1


if __name__ == "__main__":
    run_cli(main)
