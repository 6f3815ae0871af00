"""The studies judge what they measured: tables by hand, and expectations that hold and fail where they should."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from scripts.reproduce import _study as study
from scripts.reproduce import constant_speed, length_extrapolation, mqar, passkey, streaming, temperature


def failing(expectations: list[study.Expectation]) -> list[str]:
    return [e.text for e in expectations if not e.holds]


def test_markdown_is_mean_and_spread_over_seeds():
    rows = [{"name": n, "size": 8, "x": x, "seed": s} for n, s, x in (("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 5.0))]
    assert study.markdown(rows, ("name", "size", "x"), ("name", "size")).splitlines() == [
        "| name | size | x | seeds |",
        "|---|---|---|---|",
        "| a | 8 | 2 ± 1 | 2 |",
        "| b | 8 | 5 | 1 |",
    ]


def test_finish_writes_both_files_and_tells_a_failure(tmp_path, capsys):
    common = {"title": "T", "setup": {"steps": 3}, "rows": [{"x": 1.0}], "table": "| x |\n", "paper": "P."}
    good, bad = study.Expectation("up", "2 > 1", True), study.Expectation("down", "2 < 1", False)
    assert study.finish("one", tmp_path / "new", expectations=[good], **common) == 0
    assert study.finish("two", tmp_path / "new", expectations=[good, bad], **common) == 1
    saved = json.loads((tmp_path / "new" / "two.json").read_text())
    assert [e["holds"] for e in saved["expectations"]] == [True, False]
    assert saved["rows"] == [{"x": 1.0}]
    assert not {"argv", "host"} & set(saved["environment"])  # results are committed
    text = (tmp_path / "new" / "two.md").read_text()
    assert "| down | 2 < 1 | **fails** |" in text
    assert text in capsys.readouterr().out


def test_flags(monkeypatch, tmp_path):
    args = study.arguments("mqar", "doc").parse_args(["--seeds=0"])
    with pytest.raises(ConfigError, match="--seeds is 0"):
        study.check(args)
    with pytest.raises(ConfigError, match="did you mean 'based'"):
        study.pick(["based", "linear"], "basd", str)
    monkeypatch.setattr(sys, "argv", ["constant_speed", "--longest=1024"])
    with pytest.raises(ConfigError, match=r"--longest is 1024 .* use 2048"):
        constant_speed.main()


# --------------------------------------------------------------------------------------------------- mqar


def mqar_rows(**accuracy: float) -> list[study.Row]:
    """A row for every variant, at the accuracies of a study that holds but for those given by label."""
    good = {"softmax": 0.995, "aaren": 0.06, mqar.TITANS: 0.9}
    by_family = {"softmax window": 0.1, "linear": 0.5, "based": 0.9}
    scale, rows = mqar.SCALES["cpu"], []
    for variant in mqar.SCALES["cpu"].variants():
        found = accuracy.get(variant.label, good.get(variant.label, by_family.get(variant.family, 0.0)))
        cfg = scale.config(variant, 0, study.Path("x")).resolved()
        size = mqar.state_bytes(cfg.model, scale.length)
        rows.append({"mixer": variant.label, "family": variant.family, "accuracy": found, "state_bytes": size})
    return rows


def test_mqar_expectations():
    scale = mqar.SCALES["cpu"]
    assert failing(mqar.expect(mqar_rows(), scale)) == []
    assert len(mqar.expect(mqar_rows(), scale)) >= 6
    assert failing(mqar.expect(mqar_rows(softmax=0.9), scale)) == ["softmax recalls > 99 %"]
    assert len(failing(mqar.expect(mqar_rows(aaren=0.2), scale))) == 1
    first = next(v.label for v in mqar.SCALES["cpu"].variants() if v.family == "based")
    (text,) = failing(mqar.expect(mqar_rows(**{first: 0.4}), scale))
    assert text.startswith(f"{first} beats linear")
    assert failing(mqar.expect(mqar_rows(**{mqar.TITANS: 0.5}), scale)) == ["Titans beats every linear attention"]
    alone = {f"softmax{mqar.ALONE}": 0.6}
    assert failing(mqar.expect(mqar_rows(**alone), scale)) == ["softmax loses more than half without the convolution"]
    narrow = next(v.label for v in mqar.SCALES["cpu"].variants() if v.family == "softmax window")
    assert failing(mqar.expect(mqar_rows(**{narrow: 0.6}), scale)) == [f"{narrow} fails (< 50 %)"]


def test_state_bytes_by_hand():
    """softmax: K and V of T (or window) tokens; linear: D x (V + 1) with its normaliser; BASED: 1 + d + d(d+1)/2."""
    scale = mqar.SCALES["cpu"]
    width, length = scale.width, scale.length
    size = lambda attn, key_dim=0: mqar.state_bytes(
        scale.config(mqar.Variant(attn, 1e-2, key_dim), 0, study.Path("x")).resolved().model, length
    )
    assert size("softmax") == 4 * length * 2 * width
    assert size("softmax(window=8)") == 4 * 8 * 2 * width
    assert size("linear", 16) == 4 * 16 * (width + 1)
    assert size("based(feature_dim=4)") == 4 * 15 * (width + 1)


def test_rivals_have_at_least_the_state_of_based():
    sizes = {row["mixer"]: row["state_bytes"] for row in mqar_rows()}
    based = sorted(size for name, size in sizes.items() if name.startswith("based") and mqar.ALONE not in name)
    linear = sorted(size for name, size in sizes.items() if name.startswith("linear"))
    assert all(1 <= rival / own < 1.5 for own, rival in zip(based, linear, strict=True))


# ------------------------------------------------------------------------------------------------- the others


def test_passkey_expectations():
    scale = passkey.SCALES["cpu"]
    fetch, window = f"landmark, {scale.retrieve} blocks", f"softmax, window {scale.window}"
    lengths = (scale.context, scale.context * scale.multiples[-1])

    def rows(**changes: float) -> list[study.Row]:
        far = {fetch: 0.97, "landmark, all blocks": 0.5, "landmark, gate removed": 0.2, window: 0.3} | changes
        near = far | {"landmark, all blocks": 0.99}
        return [
            {"attention": a, "length": n, "digits": x, "whole keys": x**2}
            for n, found in zip(lengths, (near, far), strict=True)
            for a, x in found.items()
        ]

    assert failing(passkey.expect(rows(), scale)) == []
    assert len(failing(passkey.expect(rows(**{fetch: 0.85}), scale))) == 1
    assert len(failing(passkey.expect(rows(**{"landmark, gate removed": 0.8}), scale))) == 1
    assert len(failing(passkey.expect(rows(**{window: 0.6}), scale))) == 1


def test_length_expectations():
    def rows(softmax: list[float], ours: list[float]) -> list[study.Row]:
        times = length_extrapolation.MULTIPLES
        return [
            {"attention": a, "times": t, "loss": x}
            for a, losses in (("softmax", softmax), ("softplus, p = 15", ours))
            for t, x in zip(times, losses, strict=True)
        ]

    rising, flat = [3.0, 3.3, 3.6, 4.0, 4.4], [3.05, 3.0, 3.02, 3.1, 3.2]
    assert failing(length_extrapolation.expect(rows(rising, flat))) == []
    assert len(failing(length_extrapolation.expect(rows(rising, rising)))) == 1
    assert len(failing(length_extrapolation.expect(rows([3.0, 2.9, 2.9, 2.9, 2.9], flat)))) == 2


def test_temperature_verdict_and_steps_saved():
    def rows(gains: list[float]) -> list[study.Row]:
        curve = lambda end: [(100, 4.0), (200, 3.0), (300, end)]
        return [
            {"attention": a, "seed": s, "loss": 2.0 - g, "parameters": p, "curve": curve(2.0 - g)}
            for a, p in ((temperature.BASE, 100_000), (temperature.OURS, 100_100))
            for s, g in enumerate([0.0] * len(gains) if a == temperature.BASE else gains)
        ]

    good = rows([0.5, 0.51, 0.49])
    assert failing(temperature.expect(good)) == []
    assert "better on these seeds" in temperature.verdict(good)
    # From 3.0 at step 200 to 1.5 at step 300: softmax's final 2.0 is met at 266.7 steps.
    assert temperature.steps_saved(good, temperature.OURS) == pytest.approx(300 / (200 + 100 / 1.5))
    assert "no difference that these seeds can show" in temperature.verdict(rows([0.01, -0.02, 0.02]))
    assert "nothing can be said" in temperature.verdict(rows([0.01]))
    worse = rows([-0.1, -0.1, -0.11])
    assert temperature.steps_saved(worse, temperature.OURS) is None
    assert failing(temperature.expect(worse)) == ["not worse than softmax by 0.01 nats"]
    heavy = [dict(row, parameters=row["parameters"] + 1000 * (row["attention"] != temperature.BASE)) for row in good]
    assert failing(temperature.expect(heavy)) == ["fewer than 0.5 % more parameters"]


def test_speed_expectations():
    def rows(linear: float = 0.95, softmax: float = 0.2, slower: float = 1.1, grown: int = 1, behind: float = 9.0):
        train = {"lightning": 0.97, "linear": linear, "softmax": softmax}
        out = [
            {"what": "training", "attention": a, "length": n, "tokens_per_s": x}
            for a, low in train.items()
            for n, x in ((1024, 1000.0), (8192, 1000.0 * low))
        ]
        for a, times, size in (("linear", (1.0, slower), (64, 64 * grown)), ("softmax", (1.0, behind), (1024, 8192))):
            out += [
                {"what": "decoding", "attention": a, "length": n, "ms_per_token": t, "state_bytes": b}
                for n, t, b in zip((1024, 8192), times, size, strict=True)
            ]
        return out

    assert failing(constant_speed.expect(rows())) == []
    for change in ({"linear": 0.8}, {"softmax": 0.7}, {"slower": 2.0}, {"grown": 2}, {"behind": 1.5}):
        assert len(failing(constant_speed.expect(rows(**change)))) == 1


@pytest.mark.parametrize("module", [mqar, passkey, length_extrapolation, temperature])
@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_preset_is_a_possible_run(module, preset, tmp_path):
    """Window against context, heads against width, task against length: all that a run refuses before it starts."""
    scale = module.SCALES[preset]
    variants = {
        mqar: lambda: scale.variants(),
        passkey: lambda: [attn for attn, _ in scale.models().values()],
        length_extrapolation: lambda: [*length_extrapolation.ATTENTIONS.values()],
        temperature: lambda: [*temperature.ATTENTIONS],
    }[module]()
    for variant in variants:
        cfg = scale.config(variant, 0, tmp_path).resolved()
        if not cfg.data.source.startswith("stdlib"):
            from train.data import make_source

            make_source(cfg.data, seed=0)
    if module is passkey:
        for _, tests in scale.models().values():
            for other in tests.values():
                dataclasses.replace(cfg, attn=other).resolved()


@pytest.mark.parametrize("attn", ["softmax", "lightning"])
def test_decoding_is_timed_behind_tokens_that_were_read(attn):
    model = ModelConfig(vocab_size=17, num_layers=1, d_model=16, num_heads=2, mixers=(attn,))
    run, size = constant_speed.decoding_step(model, 40, 8)
    assert run() > 0
    assert size >= (40 * 2 * 16 * 4 if attn == "softmax" else 2 * 8 * 8 * 4)


# --------------------------------------------------------------------------------------------- streaming


def streaming_rows(ours: float = 3.2, windowed: float = 3.9, dense: float = 6.0, grown: float = 1.0) -> list[study.Row]:
    """Four windows of two texts, of which the model knows two; the numbers are the losses of the last ones."""
    line = lambda name, *losses: {"line": name, "by window": [list(losses)] * 2, "tokens": 4 * streaming.WINDOW}
    held = {"state MB at 2048": 1.0, "state MB": grown}
    rows = [line(streaming.OURS, 3.3, 3.0, 3.1, ours) | held, line(streaming.WINDOWED, 3.4, 3.8, 3.9, windowed)]
    return [*rows, line(streaming.DENSE, 3.0, 2.9, dense)]


def test_streaming_expectations():
    trained, rates = 2 * streaming.WINDOW, [{"cache": 1, "times": 2.0}, {"cache": 2, "times": 3.0}]
    judge = lambda rates=rates, **losses: failing(streaming.expect(streaming_rows(**losses), rates, trained))
    assert len(streaming.expect(streaming_rows(), rates, trained)) == 5
    assert judge() == []
    assert [text.split(":")[0] for text in judge(ours=3.61)] == [streaming.OURS]
    assert [text.split(":")[0] for text in judge(windowed=1.0)] == [streaming.WINDOWED]
    assert [text.split(":")[0] for text in judge(dense=3.4)] == [streaming.DENSE]
    assert judge(grown=1.1) == [f"{streaming.OURS}: its state does not grow"]
    assert len(judge(rates=rates[::-1])) == 1
    assert len(judge(rates=[{"cache": 1, "times": 0.9}, {"cache": 2, "times": 3.0}])) == 1
