"""`python -m evals.sinks RUN_DIR [--text FILE] [--json OUT]`: the sink study of one trained run.

Reads the newest valid checkpoint, measures sinks and extreme tokens on held-out sequences (or on a text
file), prints a table and writes `sinks.json` and `maps.npz` into the run directory; a converted checkpoint also gets
its `report.html` with the heat maps. With --text, --step, --policy or another --epsilon, --sequences or --length the
directory stays as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evals.definitions import NEARLY_EMPTY, SHARE_EPS, definitions
from evals.measure import BigramTask, attention_maps, make_measure, summarise
from jaxattn.analysis import look
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError, writing
from jaxattn.mechanisms import resolve_mixer
from jaxattn.policies.command import add_flags
from jaxattn.runs.config import RunConfig
from jaxattn.runs.opened import Trained
from jaxattn.runs.rundir import write_atomic, write_json_atomic
from train.data import Source
from train.data.open import open_source

MAP_TOKENS = 64
MAP_SEQUENCES = 2


def bigram_task(source: Source) -> BigramTask | None:
    """The probes' view of a Bigram-Backcopy source, None for text."""
    if not source.trigger_ids:
        return None
    from train.data.bb_source import BigramBackcopySource

    assert isinstance(source, BigramBackcopySource)
    log_p = np.full((source.vocab_size, source.vocab_size), -np.inf)
    characters = source.table.weights.shape[0]
    with np.errstate(divide="ignore"):
        log_p[:characters, :characters] = np.log(source.table.probabilities)
    return BigramTask(source.trigger_ids, log_p)


def held_out(cfg: RunConfig, source: Source, text: str | None = None) -> np.ndarray:
    """The sequences [n, T] the metric is read on; T is the training context unless the data are text."""
    length = cfg.data.context if source.indivisible else cfg.eval.length
    if text is not None:
        return source.encode_text(text, cfg.eval.sequences, length)
    return source.held_out(cfg.eval.sequences, length)


def held_out_of(run: Trained, count: int) -> jax.Array:
    """Token ids [count, T] of sequences that a run did not train on, those the sink metric is read on.

    Raises:
      UserError: the run's data cannot be read.
    """
    cfg = dataclasses.replace(run.cfg, eval=dataclasses.replace(run.cfg.eval, sequences=count))
    return jax.numpy.asarray(held_out(cfg, open_source(cfg)[0]))


def evaluate(cfg: RunConfig, source: Source, params: Any, step: int, text: str | None = None) -> dict[str, Any]:
    """The contents of sinks.json."""
    tokens = held_out(cfg, source, text)
    raw = make_measure(cfg.model, task=bigram_task(source))(params, tokens)
    layers = [i for i in range(cfg.model.num_layers) if cfg.model.mixer(i).mechanism is not None]
    numbers = summarise(raw, epsilon=cfg.eval.epsilon)
    return {
        "step": step,
        "attn": cfg.attn,
        "source": source.name,
        "text": text,
        "policy": cfg.model.policy,
        "data_seed": cfg.data.seed,
        "epsilon": cfg.eval.epsilon,
        "length": int(tokens.shape[1]),
        "sequences": int(tokens.shape[0]),
        "attention_layers": layers,
        "proxy": bool(np.any(raw["rows_no_distribution"] > 0)),
        "slots": slot_kinds(cfg, params, tokens),
        "notes": notes(cfg),
        **numbers,
        "definitions": definitions(numbers),
    }


def notes(cfg: RunConfig) -> list[str]:
    """What a comparison with this run hangs on, by the advice of its mechanisms."""
    found = []
    for text in dict.fromkeys(cfg.model.mixers):
        choice = resolve_mixer(text)
        advice = choice.mechanism.advice(choice.spec, cfg.data.context) if choice.mechanism else ""
        found += [advice if len(set(cfg.model.mixers)) == 1 else f"{text}: {advice}"] if advice else []
    return found


def slot_kinds(cfg: RunConfig, params: Any, tokens: np.ndarray) -> list[str]:
    """What kinds of slots the attention layers have: "learned", "constant", both or none."""
    kinds: set[str] = set()

    def trace(params: Any, tokens: Any) -> Any:
        view = look(cfg.model, params, tokens)
        kinds.update(["learned"] if view.front else [])
        for layer in view.attention:
            if layer.weights(0, 1).slots:
                kinds.add("learned" if layer.call.params else "constant")
        return view.logits

    jax.eval_shape(trace, params, tokens[:1])
    return sorted(kinds)


def write_maps(path: Path, cfg: RunConfig, source: Source, params: Any, text: str | None = None) -> None:
    """maps.npz: example attention matrices with their token labels."""
    tokens = held_out(cfg, source, text)[:MAP_SEQUENCES, :MAP_TOKENS]
    maps, slots = attention_maps(cfg.model, params, tokens)
    labels = np.array([[token_label(source, int(t)) for t in row] for row in tokens])
    whole = io.BytesIO()  # so that no half of it is ever left there
    np.savez_compressed(whole, weights=maps, tokens=tokens, labels=labels, slots=slots)
    write_atomic(path, whole.getvalue())


def token_label(source: Source, token: int) -> str:
    """What a person reads for one token."""
    if source.tokenizer is not None:
        return source.tokenizer.decode([token], skip_special_tokens=False)
    if not source.trigger_ids:  # a task's tokens have no names
        return str(token)
    from train.data.bb_table import CHARS, START

    return "<s>" if token == START else CHARS[token] if token < len(CHARS) else "<d>"


def write_study(folder: Path, cfg: RunConfig, source: Source, params: Any, result: dict[str, Any]) -> None:
    """maps.npz and, last, sinks.json, which holds the `result` of `evaluate`. Raises `OSError`."""
    write_maps(folder / "maps.npz", cfg, source, params)
    write_json_atomic(folder / "sinks.json", result)


def table(result: dict[str, Any]) -> str:
    """A short text table of one evaluation; names are the keys of sinks.json."""
    star = "*" if result["proxy"] else ""
    lines = [
        f"{result['attn']} at step {result['step']} on {result['sequences']} x {result['length']} tokens "
        f"({result['source']}, data seed {result['data_seed']})",
        f"  Sink_1 ({result['epsilon']}): {result['sink_rate']:.2f} %{star}",
    ]
    if result.get("sink_rate_slot") is not None:
        kinds = " and ".join(result["slots"]) or "learned"
        lines.append(f"  Sink on the slot ({kinds}): {result['sink_rate_slot']:.2f} %{star}")
    if result.get("risk_backcopy") is not None:
        lines.append(
            f"  backcopy risk {result['risk_backcopy']:.4f}, bigram excess {result['risk_bigram_excess']:.4f} nats"
        )
    names = [f"first_token_weight{kind}{raw}" for kind in ("", "_nontrigger", "_trigger") for raw in ("", "_raw")]
    for name in [*(n for n in names if star or not n.endswith("_raw")), "value_drain"]:
        if name in result:
            mark = star if name in names and not name.endswith("_raw") else ""
            for layer, heads in zip(result["attention_layers"], result[name], strict=True):
                shown = " ".join("none" if x is None else f"{x:.3f}" for x in heads)
                lines.append(f"  {name}{mark} layer {layer}: {shown}")
    if star:
        odd, empty = (np.mean(result[f"rows_{kind}"]) for kind in ("no_distribution", "nearly_empty"))
        lines.append(
            f"  * of |A| / (sum |A| + {SHARE_EPS:g}), because {odd:.3g} % of rows are no distributions; "
            f"{empty:.3g} % are nearly empty (sum |A| < {NEARLY_EMPTY:g})"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.sinks", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory of a training run")
    parser.add_argument("--text", help="measure on this UTF-8 text file instead of held-out data")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    parser.add_argument("--step", type=int, help="checkpoint step (default: the newest valid one)")
    parser.add_argument("--epsilon", type=float, help="threshold of the sink indicator")
    parser.add_argument("--sequences", type=int, help="how many sequences")
    parser.add_argument("--length", type=int, help="their length T (text runs)")
    add_flags(parser)
    args = parser.parse_args()

    from evals.write_result import write_result
    from jaxattn.head_tables import check_made_with, read_head_tables, settled, with_head_tables
    from jaxattn.runs.load import load_params, read_config

    cfg = read_config(args.run_dir)
    changes = {k: getattr(args, k) for k in ("epsilon", "sequences", "length") if getattr(args, k) is not None}
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, **changes))
    source, model = open_source(cfg)
    if source.indivisible and args.length not in (None, cfg.data.context):
        raise ConfigError(
            f"--length is {args.length} but all sequences of {source.name!r} have the training context of "
            f"{cfg.data.context} tokens: leave it out."
        )
    if not source.indivisible and cfg.model.position == "learned" and cfg.eval.length > cfg.model.max_positions:
        raise ConfigError(
            f"--length is {cfg.eval.length} but the model has {cfg.model.max_positions} learned positions; lower it."
        )
    cfg = dataclasses.replace(cfg, model=model)
    params, step = load_params(args.run_dir, cfg, args.step)
    tables = {} if args.heads is None else read_head_tables(args.heads, model)
    if args.policy is not None:
        policy = settled(args.policy, tables, model.kv_heads)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(model, policy=policy))
    if args.heads is not None:
        check_made_with(args.heads, params)
        params = with_head_tables(cfg.model, params, tables)
    result = evaluate(cfg, source, params, step, args.text)
    print(table(result), flush=True)
    if args.json:
        write_result(args.json, result)
    other = (args.text, args.step, args.policy, args.heads)
    if changes or any(given is not None for given in other):
        return 0  # what the folder holds is about the newest step, as configured
    with writing(args.run_dir, f"make the folder writable, or give --step={step} to leave it as it is"):
        write_study(args.run_dir, cfg, source, params, result)
    if cfg.preset == "converted":  # a trained run has its report already
        from evals.report import write_report

        print(f"report: {write_report([args.run_dir], args.run_dir / 'report.html')}")
    return 0


if __name__ == "__main__":
    run_cli(main)
