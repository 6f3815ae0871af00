"""Policies where people meet them: the commands, `jaxattn.generate`, the server's engine, the harness's reader."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn
from evals import perplexity as perplexity_command
from jaxattn.command import run_cli
from jaxattn.errors import ConfigError
from jaxattn.head_tables import check_made_with, head_file, read_head_tables, with_head_tables
from jaxattn.models import ModelConfig
from jaxattn.nn import Decoder
from jaxattn.policies import names
from jaxattn.reader import hidden_of, hidden_one_by_one, reads_state
from tests.generate.helpers import byte_run
from tests.serve.engines import Inbox, ask, engines  # noqa: F401 (a fixture)

generate_command = importlib.import_module("jaxattn.generate")  # the package's attribute is the function
COMMANDS = (
    "jaxattn.generate", "jaxattn.serve", "evals.harness", "evals.length", "evals.needle", "evals.perplexity",
    "evals.sinks", "evals.tasks",
)  # fmt: skip
SMALL = "streaming(sinks=2, recent=5)"
KEEPERS = {
    SMALL: "streaming(sinks=2, recent=40)",
    "h2o(heavy=3, recent=4)": "h2o(heavy=40, recent=40)",
    "tidal(first=0, again=1, tokens=4)": "tidal(first=0, again=1, tokens=64)",
}
MODEL = ModelConfig(vocab_size=41, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, max_positions=48)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(Decoder(MODEL).init, jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * (x.shape[0] ** -0.5 if x.ndim == 2 else 1))
    return jax.tree.map(lambda x: 2 * draw(x), shapes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return byte_run(tmp_path_factory.mktemp("policies"))


def called(module, monkeypatch, *words):
    """The exit code of a command that runs in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_cli(module.main)
    return ended.value.code


def prompt(count, seed=0):
    return np.random.default_rng(seed).integers(0, 41, (2, count))


@pytest.mark.parametrize(("small", "large"), KEEPERS.items())
def test_generate_with_room_for_all_is_dense_and_without_is_not(params, small, large):
    tokens = prompt(21)
    plain, held, lost = (
        jaxattn.generate(MODEL, params, tokens, max_new_tokens=16, policy=policy).tokens
        for policy in (None, large, small)
    )
    np.testing.assert_array_equal(held, plain)
    assert (lost != plain).any()


def test_a_stream_goes_on_behind_the_context_of_training(params):
    tokens = prompt(40)
    with pytest.raises(ConfigError, match="exceed the 48 positions"):
        jaxattn.generate(MODEL, params, tokens, max_new_tokens=64)
    found = jaxattn.generate(MODEL, params, tokens, max_new_tokens=64, policy=SMALL).tokens
    assert found.shape == (2, 64)


@pytest.mark.parametrize("policy", [*KEEPERS, "zero_tuning(gamma=3.0), h2o(heavy=3, recent=4)"])
def test_the_engine_answers_as_generate_does(running, params, policy):
    """Rows of other lengths and ages beside it, and two that take a slot after others."""
    model = dataclasses.replace(MODEL, policy=policy)
    engine = running(model, params, context=48)
    asked = [prompt(count, seed=count)[0].tolist() for count in (3, 17, 9, 1, 12)]
    boxes: list[Inbox] = [ask(engine, ids, 14) for ids in asked]
    for ids, box in zip(asked, boxes, strict=True):
        alone = jaxattn.generate(model, params, np.asarray(ids)[None], max_new_tokens=14).tokens[0]
        assert box.wait() == alone.tolist()


def test_texts_are_scored_through_a_policy_that_keeps(params):
    tokens = prompt(30)
    with_policy = lambda policy: dataclasses.replace(MODEL, policy=policy)
    hidden = {
        policy: hidden_of(with_policy(policy), {"params": params}, tokens) for policy in ("", SMALL, KEEPERS[SMALL])
    }
    assert reads_state(with_policy(SMALL))
    assert not reads_state(with_policy("zero_tuning"))
    np.testing.assert_allclose(hidden[KEEPERS[SMALL]], hidden[""], atol=2e-3)
    assert np.abs(hidden[SMALL] - hidden[""]).max() > 1e-2


def test_tokens_one_by_one_are_an_answer_and_what_is_before_them_a_prompt(params):
    """TidalDecode is dense in prompts alone: what differs from dense begins behind the prompt."""
    tokens, lossy = prompt(30), dataclasses.replace(MODEL, policy="tidal(first=0, again=1, tokens=4)")
    run = lambda model, prefill: hidden_one_by_one(model, {"params": params}, tokens, prefill=prefill)
    whole = np.asarray(run(MODEL, 0))
    for prefill in (0, 20):
        found = np.asarray(run(lossy, prefill))
        np.testing.assert_allclose(found[:, : max(prefill, 4)], whole[:, : max(prefill, 4)], atol=2e-3)
        assert np.abs(found[:, max(prefill, 4) :] - whole[:, max(prefill, 4) :]).max() > 1e-2


def test_head_tables_reach_prompts_answers_and_the_engine(running, params):
    """A table that says 9 everywhere is gamma=9, whatever the option says."""
    tokens, told = prompt(13), dataclasses.replace(MODEL, policy="zero_tuning(gamma=1.0)")
    variables = with_head_tables(told, params, {"zero_tuning": np.full((3, 4), 9.0, np.float32)})
    make = lambda model, given: jaxattn.generate(model, given, tokens, max_new_tokens=14).tokens
    expected = make(dataclasses.replace(MODEL, policy="zero_tuning(gamma=9.0)"), params)
    np.testing.assert_array_equal(make(told, variables), expected)
    assert (make(told, params) != expected).any()
    box = ask(running(told, variables, context=48), tokens[0].tolist(), 14)
    assert box.wait() == expected[0].tolist()


# --- commands


def test_tables_of_another_model_are_refused_and_of_a_rounded_one_are_read(params, tmp_path):
    path, tables = tmp_path / "heads.json", {"zero_tuning": np.ones((3, 4), np.float32)}
    path.write_text(json.dumps(head_file(tables, params)))
    np.testing.assert_array_equal(read_head_tables(path, MODEL)["zero_tuning"], tables["zero_tuning"])
    check_made_with(path, params)
    tuned = jax.tree.map(lambda x: x.astype(jnp.bfloat16) + 0.1 * jnp.std(x), params)
    check_made_with(path, {"params": tuned})
    other = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(9).standard_normal(x.shape)), params)
    with pytest.raises(ConfigError, match=r"heads.json holds head tables of another model, .*: name a file"):
        check_made_with(path, other)
    path.write_text('{"model": "mine"}')
    with pytest.raises(ConfigError, match="of another model"):
        check_made_with(path, params)


def test_a_command_refuses_tables_of_another_model(run, monkeypatch, capsys, tmp_path):
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"model": [1.0, -1.0] * 32, "zero_tuning": [[2.0, 2.0]]}))
    for module, more in ((generate_command, ("--prompt", "x")), (importlib.import_module("evals.sinks"), ())):
        assert called(module, monkeypatch, run, *more, "--policy", "zero_tuning", "--heads", path) == 2
        error = capsys.readouterr().err
        assert "of another model" in error
        assert error.count("\n") == 1


def test_the_report_of_generate_says_what_an_answer_cost(run, monkeypatch, capsys):
    words = (run, "--prompt", "some words", "--max-new-tokens", 40, "--policy-report")
    assert called(generate_command, monkeypatch, *words, "--policy", SMALL) == 0
    out = capsys.readouterr()
    line = next(line for line in out.err.splitlines() if "policy" in line)
    assert line.startswith(f"[policy {SMALL} behind 50 tokens: 0.00 MiB held, ")
    assert "sparsity 84.3 %" in line  # 8 of 51 keys are read
    assert "tokens/s" in line


def test_the_report_has_what_a_policy_counted(run, monkeypatch, capsys):
    """Of a prompt of 32 tokens in blocks of 8 one diagonal of blocks and its neighbour are read: 7 of 10 tiles."""
    policy = "minference(pattern='a_shape', init=0, local=8, block=8)"
    words = (run, "--prompt", "x" * 32, "--max-new-tokens", 1, "--policy-report", "--policy", policy)
    assert called(generate_command, monkeypatch, *words) == 0
    assert ", prompt_density 0.700" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("streming", "did you mean 'streaming'"),
        ("streaming(sink=4)", "did you mean 'sinks'"),
        ("streaming(sinks=two)", "streaming.sinks is 'two' but must be a number"),
        ("h2o, streaming", "must name one policy that keeps"),
        ("tidal(again=9)", "again=9"),
        ("streaming(", "NAME"),
    ],
)
def test_what_no_policy_is_is_one_sentence(run, monkeypatch, capsys, policy, words):
    assert called(generate_command, monkeypatch, run, "--prompt", "x", "--policy", policy) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert len(error) < 600


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_runs_a_model_lists_them(monkeypatch, capsys, name):
    assert called(importlib.import_module(name), monkeypatch, "--list-policies") == 0
    listed = capsys.readouterr().out
    assert all(f"{policy}(" in listed for policy in names())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_hands_the_policy_to_the_model(run, monkeypatch, capsys, name):
    needs = {"jaxattn.generate": ["--prompt", "x"], "evals.harness": ["--tasks", "none"], "jaxattn.serve": ["--port=0"]}
    text = ["--text", run.parent / "text.txt"]
    needs |= {"evals.perplexity": text, "evals.needle": [*text, "--out", run.parent / "needle"]}
    monkeypatch.setattr("evals.harness.load_tasks", lambda *given: [])
    monkeypatch.setattr("uvicorn.Server.run", lambda *given, **more: None)  # not to wait for requests if it starts
    words = [run, *needs.get(name, []), "--policy", "tidal(first=0, again=7)"]
    assert called(importlib.import_module(name), monkeypatch, *words) == 2
    assert "policy tidal cannot serve layer 0 (softmax)" in capsys.readouterr().err


def test_sinks_are_measured_under_a_policy_of_scores(run, monkeypatch, capsys, tmp_path):
    sinks, text, out = importlib.import_module("evals.sinks"), run.parent / "text.txt", tmp_path / "sinks.json"

    def measured(*more):
        words = (run, "--text", text, "--sequences", 2, "--length", 16, "--json", out, *more)
        assert called(sinks, monkeypatch, *words) == 0
        return json.loads(out.read_text())

    plain, tuned = measured(), measured("--policy", "zero_tuning(gamma=50.0)")
    assert np.all(np.array(tuned["first_token_weight"]) > 1.5 * np.array(plain["first_token_weight"]))
    assert tuned["policy"] == "zero_tuning(gamma=50.0)"
    (tmp_path / "heads.json").write_text('{"zero_tuning": [[50.0, 1.0]]}')
    by_head = measured("--policy", "zero_tuning(gamma=1.0)", "--heads", tmp_path / "heads.json")["first_token_weight"][
        0
    ]
    expected = tuned["first_token_weight"][0][0], plain["first_token_weight"][0][1]
    np.testing.assert_allclose(by_head, expected, atol=1e-5)
    words = (run, "--text", text, "--sequences", 2, "--length", 16, "--policy", SMALL)
    assert called(sinks, monkeypatch, *words) == 2
    assert "policy streaming leaves keys out" in capsys.readouterr().err
    assert not (run / "sinks.json").exists()


def test_perplexity_by_prompt_and_by_answer(run, monkeypatch, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words to train on, and others. " * 3)

    def nats(*more):
        assert called(perplexity_command, monkeypatch, run, "--text", text, "--context", 64, *more) == 0
        return json.loads(capsys.readouterr().out)

    plain = nats()
    for more in (
        ("--token-by-token",),
        ("--prefill", 20),
        ("--policy", "streaming(sinks=2, recent=70)", "--prefill", 9),
    ):
        assert nats(*more)["nats_per_token"] == pytest.approx(plain["nats_per_token"], abs=1e-5)
    lossy = nats("--policy", SMALL, "--token-by-token")
    assert abs(lossy["nats_per_token"] - plain["nats_per_token"]) > 1e-5
    assert lossy["policy"] == SMALL
    assert lossy["bytes_held"] < plain["bytes_held"]
    assert lossy["sparsity"] == pytest.approx(1 - 8 / 65)
    assert called(perplexity_command, monkeypatch, run, "--text", text, "--context", 64, "--prefill", 65) == 2
    assert "--prefill is 65 but must be from 0 to the 64 tokens" in capsys.readouterr().err
