"""The page that a run leaves, made anew behind each section from the rows there are."""

from __future__ import annotations

import os

from scripts.bench.device.rates import Row, rated, roof
from scripts.bench.device.run import RESULTS, Run

OURS = "jaxattn"


def write(run: Run) -> None:
    """`summary.md`, and beside it `summary.png` where matplotlib is installed."""
    try:
        from scripts.bench.device import picture
    except ImportError as error:
        seen = f"No picture: {error}."
    else:
        picture.draw(run, run.out / "summary.png")
        seen = "![errors, rates and shares](summary.png)"
    partial = run.out / "summary.md.partial"
    partial.write_text(markdown(run, seen), "utf-8")
    os.replace(partial, run.out / "summary.md")


def markdown(run: Run, picture: str) -> str:
    """All sections that have rows."""
    parts = [_head(run), picture, *(f(run) for f in (_numerics, _timed, _model)), _faults(run)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(run: Run) -> str:
    first, jax, torch = (
        next((r for r in run.of("environment") if r["case"] == c), {}) for c in ("run", "jax", "torch")
    )
    name = jax.get("device") or jax.get("reason", "no device")
    lines = [f"# {name}", ""]
    if run.small:
        lines += [
            "**A dry run: everything small, kernels simulated on a CPU. No time on this page means anything.**",
            "",
        ]
    versions = ", ".join(f"{k} {v}" for k, v in first.get("packages", {}).items() if v)
    lines.append(f"{first.get('gpu', '')}; Python {first.get('python', '?')}; {versions}; seed {run.seed}; commit "
                 f"{first.get('commit') or 'unknown'}; every number: `{RESULTS}`.")  # fmt: skip
    lines.append(f"Kernels: {jax.get('kernels', jax.get('reason', '?'))}. torch: "
                 f"{torch.get('device', torch.get('reason', '?'))}. ptxas: "
                 f"{'; '.join(f'{k} {v}' for k, v in first.get('ptxas', {}).items()) or 'none found'}.")  # fmt: skip
    for field, unit, scale in (("flops", "TFLOP/s bfloat16", 1e12), ("bytes", "GB/s, read and written", 1e9)):
        rate, whose = roof(run, field)
        if rate:
            lines.append(f"Roof: {rate / scale:,.0f} {unit} ({whose}).")
    return "\n".join(lines)


def _numerics(run: Run) -> str:
    rows = run.of("numerics")
    if not rows:
        return ""
    shapes = list(dict.fromkeys(row["shape"]["name"] for row in rows))
    table = {(row["op"], row["shape"]["name"]): row for row in rows}

    def cell(op: str, shape: str) -> str:
        row = table.get((op, shape))
        if row is None:
            return ""
        if row["status"] != "ok":
            return row["status"]
        wrong = "" if row["right"] else " **WRONG**" if row["moved"] == 0.0 else " **DIFFERS FROM RUN TO RUN**"
        return f"{row['worst']:.1e} ({row['compile_s']:.0f} s){wrong}"

    right = sum(bool(row.get("right")) for row in rows)
    lines = [
        f"## Numbers: {right} of {len(rows)} right",
        "",
        "Largest error of outputs and gradients against float32, of the largest entry (and seconds of compiling).",
        "",
        "| op | " + " | ".join(shapes) + " |",
        "|---" * (1 + len(shapes)) + "|",
    ]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    lines += [f"| {op} | " + " | ".join(cell(op, shape) for shape in shapes) + " |" for op in ops]
    return "\n".join(lines)


def _timed(run: Run) -> str:
    parts = []
    for section in ("attention", "recurrence", "sparse"):
        rows = [row for row in run.of(section) if row.get("seconds_a_call")]
        if not rows:
            continue
        head = "| case | contenders: ms (least to most), rate | ours over the best rival |"
        lines = [f"## {section.capitalize()}", "", head, "|---|---|---|"]
        for row in sorted(rows, key=lambda row: row["case"]):
            said = ", ".join(_contender(run, row, name) for name in row["seconds_a_call"])
            lines.append(f"| {row['case']} | {said} | {_ratio(row)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _contender(run: Run, row: Row, name: str) -> str:
    found = row["seconds_a_call"][name]
    ms = f"{1e3 * found['median']:.3g} ({1e3 * found['least']:.3g} to {1e3 * found['most']:.3g})"
    for field, unit, scale in (("flops", "TFLOP/s", 1e12), ("bytes", "GB/s", 1e9)):
        if row.get(field) and rated(row, name, field):
            rate = row[field] / found["median"]
            ms += f" {rate / scale:.4g} {unit}, {100 * rate / roof(run, field)[0]:.0f} % of the roof"
    return f"{name} {ms}"


def _ratio(row: Row) -> str:
    """How many times as fast as the fastest rival each of ours is."""
    seconds = {name: found["median"] for name, found in row["seconds_a_call"].items()}
    rivals = {name: s for name, s in seconds.items() if not name.startswith(OURS)}
    if not rivals or len(rivals) == len(seconds):
        return "–"
    name = min(rivals, key=lambda n: rivals[n])
    ours = (
        f"{n.removeprefix(OURS).strip() or 'ours'} {rivals[name] / s:.2f}"
        for n, s in seconds.items()
        if n not in rivals
    )
    return f"{', '.join(ours)} × {name}"


def _model(run: Run) -> str:
    rows = [row for row in run.of("model") if "tokens_per_s" in row]
    if not rows:
        return ""
    weights = next((row.get("weights", "?") for row in run.of("model") if row["case"] == "open"), "?")
    head = "| rows × prompt + new | read, tokens/s | written, tokens/s |"
    lines = [f"## SmolLM2-135M, bfloat16 ({weights})", "", head, "|---|---|---|"]
    for row in rows:
        rates = [row["tokens_per_s"][part] for part in ("prefill", "decode")]
        cells = (f"{r['median']:,.0f} ({r['least']:,.0f} to {r['most']:,.0f})" for r in rates)
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _faults(run: Run) -> str:
    """What failed, and what was not done, each with its reason once."""
    lines: dict[str, list[str]] = {}
    for row in run.rows:
        if row["status"] != "ok":
            lines.setdefault(f"{row['status']}: {row.get('reason', '')}", []).append(row["case"])
        for name, reason in row.get("absent", {}).items():
            lines.setdefault(f"not there: {name}: {reason}", []).append(row["case"])
        if row.get("right") is False:
            errors = ", ".join(f"{part} {e:.1e}" for part, e in row["errors"].items())
            xla = max(row.get("xla", {"": 0.0}).values())
            lines.setdefault(f"WRONG: {errors}; runs differ by {row['moved']:.1e}; xla's worst {xla:.1e}", []).append(
                row["case"]
            )
    if not lines:
        return ""
    said = [f"- {reason} ({', '.join(cases[:4])}{f' and {len(cases) - 4} more' if len(cases) > 4 else ''})"
            for reason, cases in lines.items()]  # fmt: skip
    return "\n".join(["## What failed or was left out", "", *said])
