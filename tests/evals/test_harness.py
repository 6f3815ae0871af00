"""The harness adapter beside a direct computation: batches, sampling, retrieval, generation options, the command."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.errors import ConfigError, UserError
from jaxattn.nn import Decoder
from jaxattn.sampling import Sampling
from jaxattn.text import load
from tests.generate.helpers import byte_run

pytest.importorskip("lm_eval", reason="extra eval")
from lm_eval.api.instance import Instance

from evals import harness
from evals.gen_kwargs import read_gen_kwargs
from evals.harness import parse_options
from evals.harness_lm import JaxattnLM


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return byte_run(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def adapter(run):
    return JaxattnLM(load(run), batch_size=3)


def ask(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


PAIRS = [("abc", " de"), ("a", "b"), ("", "xyz"), ("blank ", "x"), ("some", " more text"), ("", "\n"), ("  ", "ab")]


def scored(adapter, pairs=PAIRS):
    return adapter.loglikelihood([ask("loglikelihood", *pair) for pair in pairs])


def generated(adapter, prompts, **options):
    return adapter.generate_until([ask("generate_until", prompt, options) for prompt in prompts])


def log_p(adapter, ids):
    """log p of every token but the first, by one plain forward pass."""
    row = jnp.asarray([[*ids, *[0] * (24 - len(ids))]])  # of one shape; what is behind changes nothing before it
    logits = jax.jit(Decoder(adapter.loaded.model).apply)(adapter.loaded.params, row)[0]
    logp = np.asarray(jax.nn.log_softmax(logits))
    return logp[np.arange(len(ids) - 1), ids[1:]], logp.argmax(-1)


def test_loglikelihoods_are_those_of_a_forward_pass(adapter):
    for (prompt, more), (value, greedy) in zip(PAIRS, scored(adapter), strict=True):
        ids = [*([] if prompt.strip() else [256]), *(prompt + more).encode()]
        count = len(more) + len(prompt) - len(prompt.rstrip())
        values, best = log_p(adapter, ids)
        assert value == pytest.approx(float(values[-count:].sum()), abs=1e-3)
        assert greedy == bool(np.all(best[-count - 1 : -1] == ids[-count:]))


def test_neither_batches_nor_the_order_of_requests_change_an_answer(run, adapter):
    prompts, options = ["ab", "c", "some words", "d e"], {"until": ["o"], "max_gen_toks": 6}
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    expected = [scored(adapter), generated(adapter, prompts, **options), generated(adapter, prompts, **sampled)]
    for size in (1, 5):
        other = JaxattnLM(adapter.loaded, batch_size=size)
        np.testing.assert_allclose(scored(other), expected[0], atol=1e-4)
        assert generated(other, prompts, **options) == expected[1]
        assert generated(other, prompts, **sampled) == expected[2]
    np.testing.assert_allclose(scored(adapter, PAIRS[::-1]), expected[0][::-1], atol=1e-4)
    assert generated(adapter, prompts[::-1], **options) == expected[1][::-1]


def test_repeats_draw_anew_and_a_seed_draws_again(adapter):
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8, "until": []}
    texts = generated(adapter, ["ab"] * 4, **sampled)
    assert len(set(texts)) == 4
    assert generated(adapter, ["ab"] * 4, **sampled) == texts
    assert generated(JaxattnLM(adapter.loaded, batch_size=3, seed=7), ["ab"] * 4, **sampled) != texts
    greedy = generated(adapter, ["ab"] * 2, max_gen_toks=8, until=[])
    assert greedy[0] == greedy[1]


def test_retrieving_attention_is_scored_and_generated_through_its_state(tmp_path):
    """Against pieces of `Decoder.step` written out here; one forward pass attends to everything."""
    text = "landmark(block=3, retrieve=1, context=16)"
    run = byte_run(tmp_path, "landmark(block=3)")
    adapter, plain = (JaxattnLM(load(run, attn=attn), batch_size=2, max_length=64) for attn in (text, None))
    model, variables = adapter.loaded.model, adapter.loaded.params
    step = jax.jit(functools.partial(Decoder(model).apply, method="step"))
    prompt = "words to remember, and more of them"
    ids = list(prompt.encode())

    def read(ids):
        """log p behind every token, 9 at a time: 21 positions less 2 blocks of 4 for retrieval leave 3 blocks."""
        states, found = Decoder(model).apply(variables, 1, 96, method="start"), []
        for at in range(0, len(ids), 9):
            part = jnp.asarray([ids[at : at + 9]])
            place = jnp.arange(at, at + part.shape[1])[None]
            logits, states = step(variables, states, part, place)
            found.append(logits[0])
        return np.asarray(jax.nn.log_softmax(jnp.concatenate(found)))

    assert model.mixer(0).mechanism.piece(model.mixer(0).spec) == 9
    logp = read(ids[:-1])
    (found, other) = (scored(lm, [(prompt[:8], prompt[8:])])[0][0] for lm in (adapter, plain))
    assert found == pytest.approx(logp[np.arange(7, len(ids) - 1), ids[8:]].sum(), abs=1e-3)
    assert abs(found - other) > 1e-2
    (answer,) = generated(adapter, [prompt], max_gen_toks=1, until=[])
    assert answer == adapter.tokenizer.decode([int(read(ids)[-1].argmax())])


def test_half_precision_is_close(run, adapter):
    half = JaxattnLM(load(run, dtype="bfloat16"), batch_size=3)
    ours, exact = (np.array([value for value, _ in scored(lm)]) for lm in (half, adapter))
    assert 0 < np.abs(ours - exact).max() < 0.3


def test_what_has_no_token_or_does_not_fit_is_refused(adapter):
    for pair, message in (
        (("a", "b" * 17), r"has 17 tokens .* needs from 1 to 16"),
        (("", ""), "the continuation '' has no token"),
        (("a", ""), "has 0 tokens behind its context"),
    ):
        with pytest.raises(ConfigError, match=message):
            scored(adapter, [pair])
    with pytest.raises(ConfigError, match=r"16 new tokens leave no room .* in 16"):
        generated(adapter, ["a"], max_gen_toks=16)
    for length in (1, 0):
        with pytest.raises(ConfigError, match="max_length is"):
            JaxattnLM(adapter.loaded, max_length=length)
    model = dataclasses.replace(adapter.loaded, model=dataclasses.replace(adapter.loaded.model, max_positions=16))
    with pytest.raises(ConfigError, match="max_length is 17 but must be from 2 to 16"):
        JaxattnLM(model, max_length=17)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        JaxattnLM(adapter.loaded, batch_size=0)


def test_text_ends_at_the_first_stop_string(adapter):
    (whole,) = generated(adapter, ["ab"], until=[], max_gen_toks=12)
    for stops in ([whole[2:4]], [whole[5:7], whole[1:3]], ["never", whole[3]]):
        (cut,) = generated(adapter, ["ab"], until=stops, max_gen_toks=12)
        assert cut == whole[: min(whole.index(s) for s in stops if s in whole)]


def test_without_a_template_no_conversation(adapter):
    with pytest.raises(UserError, match="has no chat template"):
        adapter.apply_chat_template([{"role": "user", "content": "a"}])


# -------------------------------------------------------------------------------------------- generation options


def gen_kwargs(given, **checkpoint):
    return read_gen_kwargs(given, checkpoint=checkpoint, end="</s>", default_count=256)


def test_generation_options_are_read_as_transformers_reads_them():
    assert gen_kwargs({}) == (Sampling(), 256, None, ("</s>",), 256)
    assert gen_kwargs({"max_gen_toks": 9, "max_length": 5}, max_new_tokens=4)[1:] == (4, None, ("</s>",), 9)
    assert gen_kwargs({"until": "a", "max_tokens": 5, "max_gen_toks": 4}).until == ("a", "</s>")
    assert gen_kwargs({"max_tokens": 5, "max_gen_toks": 4}).count == 4
    assert gen_kwargs({"do_sample": False, "temperature": 0.9, "top_p": 0.5}, typical_p=0.3).how == Sampling()
    sampled = {"do_sample": True, "temperature": 0.5}
    assert gen_kwargs(sampled).how == Sampling(0.5, 50)  # the top 50 are transformers' default
    assert gen_kwargs({"temperature": 0.5}, top_k=20, top_p=0.8, temperature=0.1).how == Sampling(0.5, 20, 0.8)
    assert gen_kwargs(sampled | {"top_k": 0, "min_p": 0.1}, top_k=20).how == Sampling(0.5, 0, 1.0, 0.1)
    assert gen_kwargs({"repetition_penalty": 1.0, "num_beams": 1, "use_cache": False}, repetition_penalty=1.1)


@pytest.mark.parametrize(
    ("given", "checkpoint", "message"),
    [
        ({"num_beams": 4}, {}, "num_beams is 4, which is not built"),
        ({"repetition_penalty": 1.2}, {}, "repetition_penalty is 1.2"),
        ({}, {"repetition_penalty": 1.1}, "sets repetition_penalty to 1.1.* --gen-kwargs repetition_penalty=1 to do"),
        ({"temperature": 1.0}, {"typical_p": 0.9}, "sets typical_p to 0.9"),
        ({"tempreature": 1.0}, {}, "tempreature is not built; known are"),
        ({"do_sample": True}, {}, "without a temperature"),
        ({"do_sample": True, "temperature": -1.0}, {}, "temperature is -1.0"),
        ({"temperature": "hot"}, {}, "'hot'"),
        ({"temperature": 1.0, "top_k": "x"}, {}, "'x'"),
        ({"until": 3}, {}, "until is"),
        ({"until": [None]}, {}, "must be texts"),
        ({}, {"max_new_tokens": "5"}, "sets max_new_tokens to '5'"),
        ({"max_gen_toks": 0}, {}, "ask for 0 tokens"),
        ({"max_gen_toks": "many"}, {}, "'many'"),
    ],
)
def test_generation_options_that_are_not_built_are_refused_by_name(given, checkpoint, message):
    with pytest.raises(ConfigError, match=message) as error:
        gen_kwargs(given, **checkpoint)
    assert "\n" not in str(error.value)


def test_options_on_the_command_line():
    read = functools.partial(parse_options, "--gen-kwargs")
    assert read(None) is None
    assert read("temperature=0.7,do_sample=True") == {"temperature": 0.7, "do_sample": True}
    assert read('{"until": ["a", "b"]}') == {"until": ["a", "b"]}
    for text in ("", "hot", "a=1,b", "{", "[1]"):
        with pytest.raises(ConfigError, match="--gen-kwargs is"):
            read(text)


# -------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"q": "a", "choices": ["b", "c"], "gold": i % 2} for i in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = (
        "task: toy\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'data.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "toy.yaml").write_text(lines)
    strange = lines.replace("task: toy", "task: strange").replace("{{q}}", "{{1 // (1 - gold)}}")  # of the second row
    (folder / "strange.yaml").write_text(strange)
    (folder / "away.yaml").write_text(lines.replace("task: toy", "task: away").replace("json\n", "nobody/nowhere\n", 1))
    return folder


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evals.harness", *map(str, words)])
    return harness.main()


@pytest.mark.usefixtures("small_index")
def test_the_command_runs_a_task_of_ones_own(run, task_folder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.json"
    for tasks in (["--tasks=toy", "--include-path", task_folder], [f"--tasks={task_folder / 'toy.yaml'}"]):
        assert command(monkeypatch, run, *tasks, "--json", out) == 0
        results = json.loads(capsys.readouterr().out)
        assert results["toy"]["acc,none"] == 0.5
        assert json.loads(out.read_text()) == results
    command(monkeypatch, run, *tasks, "--limit=1", "--num-fewshot=0", "--seed=3", "--batch-size=2", "--max-length=8")
    assert json.loads(capsys.readouterr().out)["toy"]["acc,none"] in (0, 1)


BAD = {
    "task": (["--tasks=arc_eazy"], ["'arc_eazy' is not known", "did you mean 'arc_easy'"]),
    "nothing": (["--tasks=,"], ["--tasks is ','"]),
    "file": (["--tasks=nowhere.yaml"], ["'nowhere.yaml' is not known"]),
    "folder": (["--tasks=toy", "--include-path=nowhere"], ["--include-path is 'nowhere'"]),
    "limit": (["--tasks=TOY", "--limit=0"], ["--limit is 0"]),
    "examples": (["--tasks=TOY", "--num-fewshot=-1"], ["--num-fewshot is -1"]),
    "seed": (["--tasks=TOY", "--seed=-1"], ["--seed is -1"]),
    "turns": (["--tasks=TOY", "--fewshot-as-multiturn"], ["add --apply-chat-template"]),
    "chat": (["--tasks=TOY", "--apply-chat-template"], ["has no chat template"]),
    "options": (["--tasks=TOY", "--gen-kwargs=hot"], ["--gen-kwargs is 'hot'"]),
    "variables": (["--tasks=TOY", "--chat-template-args=messages=1"], ["chat_template_args hold messages"]),
    "documents": (["--tasks=STRANGE"], ["failed on its documents", "ZeroDivisionError"]),
    "twice": (["--tasks=TOY,TOY2"], ["names toy twice"]),
    "checkpoint": (["--tasks=TOY"], ["holds no run"]),
    "out": (["--tasks=TOY", "--limit=1", "--json=."], [". cannot be written", "choose another --json"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, run, task_folder, monkeypatch, tmp_path, request, capsys):
    if name != "task":
        request.getfixturevalue("small_index")
    (tmp_path / "toy2.yaml").write_text((task_folder / "toy.yaml").read_text())
    paths = {"TOY2": tmp_path / "toy2.yaml", "TOY": task_folder / "toy.yaml", "STRANGE": task_folder / "strange.yaml"}
    words, says = BAD[name]
    for key, path in paths.items():
        words = [word.replace(key, str(path)) for word in words]
    with pytest.raises(UserError) as error:
        command(monkeypatch, tmp_path if name == "checkpoint" else run, *words)
    assert error.value.exit_code == 2
    assert all(part in str(error.value) for part in says), str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert ('"acc,none"' in capsys.readouterr().out) == (name == "out")  # what was measured is not lost


@pytest.mark.parametrize(("mark", "why"), [("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "shows pictures")])
def test_tasks_of_other_kinds_are_refused(mark, why):
    with pytest.raises(ConfigError, match=f"the task odd {why}"):
        harness._check_task(types.SimpleNamespace(task_name="odd", **{mark: True}))


def test_data_that_cannot_be_reached_are_named(run, task_folder, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    call = [sys.executable, "-m", "evals.harness", str(run), f"--tasks={task_folder / 'away.yaml'}"]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | offline)
    assert (done.returncode, done.stdout) == (2, "")
    *_, line = done.stderr.splitlines()
    assert line.startswith("error: the data of the task ")
    assert "nobody/nowhere" in line
    assert "Traceback" not in done.stderr
