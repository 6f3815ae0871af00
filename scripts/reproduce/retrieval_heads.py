"""Which heads a real model copies by, and what is left of its needles without them.

    python -m scripts.reproduce.retrieval_heads CKPT --text FILE [--name NAME] [--tops 5,10,20] [--draws 5]

CKPT is a converted instruct model and FILE a long text, such as SmolLM2-135M-Instruct and essays. Heads are scored by
what they copy while the model answers with numbers and phrases hidden in parts of the text (arXiv 2404.15574). Then
other five-digit numbers are hidden, and asked for with the first K heads masked, and with K heads drawn among those
that are no retrieval heads: uniform (queries of 0) or without output, in answers alone behind a prompt that was read
once with all heads, or in prompts too. What was measured for the same setup is not measured again. Exits 1 if an
expectation fails:

  the map             1 to 10 % of heads score 0.1 or more (3 to 6 % in the paper's models)
  each K              no more digits without the first K heads than without any of the draws
  the largest K       at most half of dense's digits without the first K; in answers, where the paper masks, without
                      drawn ones at most 10 points less (in prompts these may hold what the first heads look for)
  induction           the first 20 heads share more with the first 20 by induction than three times chance
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.heads import copied, repeats
from evals.needle import depths_of, questions
from evals.needles import Asked, numbers_of, right, vocabulary
from evals.plot_style import heat
from evals.text_file import read_text_file
from jaxattn.analysis.answers import answer, read_prompts
from jaxattn.analysis.heads import order
from jaxattn.analysis.retrieval import THRESHOLD
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.head_tables import with_head_tables
from jaxattn.policies.mask_heads import TABLE
from jaxattn.text import Loaded, load
from scripts.outputs import folder_to_write
from scripts.reproduce import _study as study

NEW = 8  # tokens of an answer: a blank, five digits, the end
ROWS = 10  # questions that are read at once
OVERLAP = 20
PAPER = (
    "3 to 6 % of heads score 0.1 or more in six models of 6B to 47B; needles fall below 50 with 50 heads masked and "
    "stay at 80 or more with as many random ones. Here heads are fewer and needles shorter."
)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which heads [L, H], in what way, and in which phases."""

    heads: np.ndarray
    by: str
    phases: str

    @property
    def policy(self) -> str:
        return f"mask_heads(top=1, by={self.by}, phases={self.phases})" if self.heads.any() else "mask_heads(top=0)"


class Needles:
    """Questions about a text whose prompts are read once, to be answered under many masks."""

    def __init__(self, loaded: Loaded, asked: list[Asked]):
        self.asked, self.loaded = asked, loaded
        self.stop = vocabulary(loaded).breaks | set(loaded.stop_tokens)
        self.parts = [asked[n : n + ROWS] for n in range(0, len(asked), ROWS)]
        self.cursors: list[Any] = []

    def right(self, mask: Mask) -> dict[str, float]:
        """The shares of digits and of whole numbers given back."""
        model = dataclasses.replace(self.loaded.model, policy=mask.policy)
        params = with_head_tables(model, self.loaded.params, {TABLE: mask.heads.astype(np.float32)})
        if mask.phases == "answers" and not self.cursors:
            self.cursors = [self._read(model, params, part) for part in self.parts]
        marks = []
        for n, part in enumerate(self.parts):
            cursor = jax.tree.map(jnp.copy, self.cursors[n]) if mask.phases == "answers" else None
            cursor = cursor or self._read(model, params, part)
            found = answer(model, params, cursor, [q.said for q in part], new=NEW, stop=self.stop)
            decode = self.loaded.tokenizer.decode
            marks += [right(decode(ids), q.answer) for ids, q in zip(found, part, strict=True)]
        digits = [mark.digits / len(q.answer) for mark, q in zip(marks, self.asked, strict=True)]
        return {"digits": float(np.mean(digits)), "needles": float(np.mean([mark.whole for mark in marks]))}

    def _read(self, model: Any, params: Any, part: list[Asked]) -> Any:
        room = max(len(q.said) for q in part) + NEW
        return read_prompts(model, params, [q.prompt for q in part], room=room)


def masks(
    scores: np.ndarray, *, tops: list[int], draws: int, prompts: bool = True
) -> list[tuple[dict[str, Any], Mask]]:
    """What is masked, and how it is named in a row: nothing, the first K heads, and K drawn ones of low scores; with
    `prompts` the largest K in prompts too."""
    first, low = order(scores), np.flatnonzero(scores.reshape(-1) < THRESHOLD)
    none = {"heads": 0, "which": "none", "draw": 0, "by": "uniform", "phases": "answers"}
    found = [(none, Mask(np.zeros_like(scores, bool), "uniform", "answers"))]
    hows = [("uniform", "answers"), ("zero", "answers"), *([("uniform", "all")] if prompts else [])]
    for by, phases in hows:
        for top in tops if phases == "answers" else tops[-1:]:
            named = {"heads": top, "by": by, "phases": phases}
            found.append(({**named, "which": "first", "draw": 0}, Mask(first <= top, by, phases)))
            for draw in range(draws):
                drawn = np.zeros(scores.size, bool)
                drawn[np.random.default_rng((top, draw)).permutation(low)[:top]] = True
                found.append(({**named, "which": "drawn", "draw": draw}, Mask(drawn.reshape(scores.shape), by, phases)))
    return found


def expect(rows: list[study.Row], profile: dict[str, Any]) -> list[study.Expectation]:
    """The lines of the module docstring, for whatever was measured."""
    scores, induction = (np.asarray(profile[name]) for name in ("retrieval", "induction"))
    share = float(np.mean(scores >= THRESHOLD))
    out = [study.Expectation("1 to 10 % of heads score 0.1 or more", f"{share:.1%}", 0.01 <= share <= 0.1)]
    dense = study.select(rows, "digits", which="none")[0]
    kinds = dict.fromkeys((row["by"], row["phases"]) for row in rows if row["which"] != "none")
    for by, phases in kinds:
        some = {"by": by, "phases": phases}
        tops = sorted({row["heads"] for row in rows if row["which"] == "first" and some.items() <= row.items()})
        pick = lambda which, top, some=some: study.select(rows, "digits", which=which, heads=top, **some)
        where = f"{by}, {'in answers' if phases == 'answers' else 'in prompts too'}"
        for top in tops:
            first, drawn = pick("first", top)[0], pick("drawn", top)
            text = f"{where}: no more digits without the first {top} heads than without any {top} drawn"
            out.append(study.Expectation(text, f"{first:.0%} against {min(drawn):.0%} or more", first <= min(drawn)))
        first, drawn = pick("first", tops[-1])[0], float(np.mean(pick("drawn", tops[-1])))
        text = f"{where}: without the first {tops[-1]} at most half of dense's digits"
        out.append(study.Expectation(text, f"{first:.0%} of {dense:.0%}", first <= dense / 2))
        if phases != "answers":
            continue
        text = f"{where}: without {tops[-1]} drawn ones at most 10 points less than dense, on average"
        out.append(study.Expectation(text, f"{drawn:.0%} against {dense:.0%}", drawn >= dense - 0.1))
    count = min(OVERLAP, scores.size // 4)
    both = int(np.sum((order(scores) <= count) & (order(induction) <= count)))
    chance = count**2 / scores.size
    text = f"first {count} heads among the first {count} by induction: more than three times chance"
    return [*out, study.Expectation(text, f"{both}, by chance {chance:.1f}", both > 3 * chance)]


def draw(rows: list[study.Row], scores: np.ndarray, left: Any, middle: Any, right: Any) -> None:
    """The map, and digits against the number of masked heads for both ways of masking in answers."""
    left.grid(False)
    drawn = heat(left, scores, vmin=0)
    left.figure.colorbar(drawn, ax=left, label="copy score")
    left.set(xlabel="head", ylabel="layer")
    dense = study.select(rows, "digits", which="none")[0]
    for axes, by in ((middle, "uniform"), (right, "zero")):
        mine = [row for row in rows if row["by"] == by and row["phases"] == "answers" and row["which"] != "none"]
        for which, color in (("first", "#d55e00"), ("drawn", "#0072b2")):
            tops = sorted({row["heads"] for row in mine if row["which"] == which})
            each = [study.select(mine, "digits", which=which, heads=top) for top in tops]
            axes.plot([0, *tops], [dense, *map(np.mean, each)], "o-", color=color, ms=4, label=f"{which} heads")
            axes.fill_between([0, *tops], [dense, *map(min, each)], [dense, *map(max, each)], color=color, alpha=0.15)
        axes.set(xlabel="masked heads", ylim=(-0.04, 1.04), title=f"{by}, in answers")
        axes.legend()
    middle.set_ylabel("digits given back")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.reproduce.retrieval_heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="converted checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--name", default="retrieval_heads", help="of the result (default retrieval_heads)")
    parser.add_argument("--lengths", default="512,1k", help="tokens of the texts that score heads (default 512,1k)")
    parser.add_argument("--cases", type=int, default=32, help="of these (default 32)")
    parser.add_argument("--needles", type=int, default=20, help="numbers asked for under every mask (default 20)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of their texts (default 1024)")
    parser.add_argument("--tops", default="5,10,20", help="how many heads are masked (default 5,10,20)")
    parser.add_argument("--draws", type=int, default=5, help="of random heads (default 5)")
    parser.add_argument("--answers-alone", action="store_true", help="no masks in prompts, which are then read once")
    parser.add_argument("--out", type=Path, default=study.RESULTS, help="where the table and the plot go")
    args = parser.parse_args()
    for flag in ("cases", "needles", "length", "draws"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(args, flag)} but must be at least 1.")
    tops, lengths = numbers_of(args.tops, "--tops"), numbers_of(args.lengths, "--lengths")
    folder_to_write(args.out)
    text = read_text_file(args.text)
    loaded = load(args.checkpoint)
    if 2 * tops[-1] > loaded.model.num_layers * loaded.model.num_heads:
        raise ConfigError(
            f"--tops has {tops[-1]} but the model has {loaded.model.num_layers * loaded.model.num_heads}."
        )
    ids = np.asarray(loaded.tokenizer.encode(text, add_special_tokens=False), np.int32)
    scored = {"model": args.checkpoint.name, "text": args.text.name, "lengths": lengths, "cases": args.cases}
    profile = _profile(args.out / f"{args.name}_profile.json", scored, loaded, ids)
    scores = np.asarray(profile["retrieval"])
    setup = {**scored, "needles": args.needles, "length": args.length, "counted": profile["counted"]}
    asked = questions(loaded, ids, length=args.length, depths=depths_of(args.needles), seed=1)
    needles = Needles(loaded.prepared(consume=True), asked)
    rows = study.known_rows(args.out / f"{args.name}.json", setup)
    for named, mask in masks(scores, tops=tops, draws=args.draws, prompts=not args.answers_alone):
        if any(named.items() <= row.items() for row in rows):
            continue
        rows.append({**named, **needles.right(mask)})
        print(json.dumps(rows[-1]), flush=True)
        study.write_rows(args.out / f"{args.name}.json", rows, setup=setup)
    study.save_figure(args.out / f"{args.name}.png", 10.0, 3.4, 3, lambda *axes: draw(rows, scores, *axes))
    columns = ("which", "heads", "by", "phases", "digits", "needles")
    return study.finish(
        args.name,
        args.out,
        title="Retrieval heads: needles without them",
        setup=setup,
        rows=rows,
        table=study.markdown(rows, columns, columns[:4]),
        expectations=expect(rows, profile),
        paper=PAPER,
    )


def _profile(path: Path, setup: dict[str, Any], loaded: Loaded, ids: np.ndarray) -> dict[str, Any]:
    """Head tables, and how many answers counted; measured once and kept."""
    if path.is_file() and (found := json.loads(path.read_text("utf-8"))).get("setup") == setup:
        return found
    known = vocabulary(loaded)
    retrieved = copied(loaded, ids, count=setup["cases"], lengths=setup["lengths"], breaks=known.breaks)
    tables = {"retrieval": retrieved.mean(), **repeats(loaded, known.plain, 2, None)}
    found = {name: np.round(table, 4).tolist() for name, table in tables.items()}
    found |= {"counted": int(retrieved.counted.sum())}
    study.write_rows(path, [], setup=setup, **found)
    return found


if __name__ == "__main__":
    run_cli(main)
