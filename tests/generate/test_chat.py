"""Chat templates: what they may use and read, as transformers renders them; and what a hostile one costs."""

from __future__ import annotations

import datetime
import json
import os
import resource
import threading
from pathlib import Path

import pytest

from jaxattn import _chat_child, chat
from jaxattn.chat import choose_template, read_templates, render
from jaxattn.errors import Corrupt, UserError
from tests.generate.checkpoints import TEMPLATES, tokenizer_files

USER = {"role": "user", "content": "hi <b> é 'q'"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None]}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "<&> ü", "parameters": {"type": "object"}}}
TALKS = {
    "one": [USER],
    "named": [{**USER, "name": "ann"}, {"role": "assistant", "content": "yes", "name": None}],
    "null content": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": "x"}]}],
    "reasoning": [USER, {"role": "assistant", "content": "b", "reasoning_content": "\nso\n"}],
    "thinking": [USER, {"role": "assistant", "content": "b", "thinking": "so"}],
    "other reasoning": [USER, {"role": "assistant", "content": "b", "reasoning": "so", "extra": {"k": [1.5, True]}}],
}
HELPERS = {
    "every message": "{% for m in messages %}{{ m }}\n{% endfor %}",
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ messages[0] | tojson(sort_keys=true, separators=(',', ':')) }}"
    "{{ 'ü<' | tojson(ensure_ascii=true) }}",
    "what is there": "{{ tools is none }}{{ documents is defined }}{{ strftime_now is defined }}"
    "{{ add_generation_prompt }}"
    "{{ nothing is defined }}{{ bos_token }}{{ eot_token }}{{ image_token is defined }}",
    "date": "{{ strftime_now('%Y-%m-%d') }}",
    "loops": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{% if not m.role %}{% continue %}{% endif %}"
    "{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}"
    "{% endgeneration %}{{ x }}{% endfor %}"
    "{%- generation -%}  end  {%- endgeneration -%}",
    "blocks": "{% for m in messages %}\n   {% if true %}\n {{ m.role }}\n   {% endif %}\n{% endfor %}\n\n",
    "namespace": "{% set ns = namespace(x=1, y='a') %}{% for m in messages %}"
    "{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}{{ ns.y }}",
    "dict": "{{ dict(a=1, b=2) }}{{ dict.fromkeys(['a'], 3) }}{{ {'a': 1}.items() | list }}",
    "macro": "{% macro f(m, k='role') %}<{{ m[k] }}>{% endmacro %}{{ f(messages[0]) }}"
    "{{ f(messages[0], k='content') }}",
    "methods": "{{ messages[0].content.split(' ')[-1].upper() }}"
    "{{ messages[0].get('no', 'none') }}{{ '%s!' % 'a' }}{{ 'a' ~ 1 }}",
    "filters": "{{ messages | map(attribute='role') | join(',') }}{{ ' x ' | trim }}"
    "{{ [3, 1] | sort }}{{ 'aB' | title }}",
    "tests": "{{ messages[0].content is string }}{{ messages is iterable }}"
    "{{ messages[0] is mapping }}{{ none is none }}",
    "variables": "{{ enable_thinking is defined and not enable_thinking }}{{ custom }}{{ documents }}",
    "whitespace": "a  \n  {%- if true %}  b{%- endif %}\r\nc\r\n",
    "forbidden": "{{ messages.append(1) }}",
    "private": "{% set ns = namespace(_x=1) %}",
    "underscore": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "undefined": "{{ nothing.more }}",
    "refusing": "{{ raise_exception('no such role') }}",
    "failing": "{{ 1 / 0 }}",
    "broken": "{% if %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    pytest.importorskip("torch", reason="transformers is the oracle")
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_files("mistral", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eot_token": "[INST]"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [*HELPERS, *TEMPLATES])
def test_a_template_is_rendered_as_transformers_renders_it(theirs, name):
    """Or refused where it raises there."""
    template = HELPERS.get(name) or TEMPLATES[name]
    more = {"enable_thinking": False, "custom": {"a": [1]}}
    rendered = 0
    for messages in TALKS.values():
        for tools, documents in ((None, None), ([TOOL], [{"title": "t", "text": "x"}])):
            call = {"tools": tools, "documents": documents, "add_generation_prompt": True, **more}
            try:
                wanted = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **call)
            except Exception:  # noqa: BLE001  a template can raise anything
                with pytest.raises(UserError) as caught:
                    render(template, theirs.special_tokens_map, messages, **call)
                assert "\n" not in str(caught.value)
                continue
            assert render(template, theirs.special_tokens_map, messages, **call) == wanted
            rendered += 1
    refused = name in ("forbidden", "private", "underscore", "undefined", "refusing", "failing", "broken")
    assert (rendered == 0) == refused


def test_the_date_is_today():
    before = datetime.date.today()
    assert render("{{ strftime_now('%Y-%m-%d') }}", {}, [USER]) in (str(before), str(datetime.date.today()))


def test_files_come_before_configurations_and_names_are_kept(tmp_path):
    """The order of transformers: chat_template.jinja and additional_chat_templates shut tokenizer_config.json out."""
    pytest.importorskip("torch", reason="transformers is the oracle")
    import transformers

    tokenizer_files("qwen3", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    put = lambda value: (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
    oracle = lambda: transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template
    as_dict = lambda found: {"default": found} if isinstance(found, str) else found
    put("config")
    (tmp_path / "chat_template.jinja").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_templates(tmp_path) == as_dict(oracle()) == {"default": "one\ntwo\nthree\n"}
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    assert read_templates(tmp_path) == oracle()
    assert choose_template(read_templates(tmp_path), tmp_path, tools=True) == "tools"
    (tmp_path / "chat_template.jinja").unlink()
    assert read_templates(tmp_path) == oracle() == {"tool_use": "tools"}
    with pytest.raises(UserError, match="none is the default"):
        choose_template(read_templates(tmp_path), tmp_path)
    (more / "tool_use.jinja").unlink()
    assert read_templates(tmp_path) == as_dict(oracle()) == {"default": "config"}
    put([{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}])
    assert read_templates(tmp_path) == oracle() == {"default": "a", "tool_use": "b"}
    put(None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert read_templates(tmp_path) == {"default": "old"}


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": [1, 2]}), r"chat_template is \[1, 2\] but must be text"),
        ("tokenizer_config.json", json.dumps({"chat_template": 7}), "chat_template is 7 but must be text"),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "x"}]}), "must be text, or a list"),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": [], "template": ""}]}), "must be text, or"),
        ("tokenizer_config.json", json.dumps({"chat_template": {"default": {}}}), "must be text, or a list"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8 text"),
        ("chat_template.json", "[1]", "holds a JSON list but must hold an object"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, name, raw, words):
    (tmp_path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(Corrupt, match=words):
        read_templates(tmp_path)


HOSTILE = {
    "memory": ("{{ 'a' * 3000000000 }}", "needs more than [0-9,]+ bytes of memory"),
    "a list": ("{{ [1] * 10**9 }}", "needs more than [0-9,]+ bytes of memory"),
    "a wide format": ("{{ '%1000000000d' % 5 }}", "needs more than [0-9,]+ bytes of memory"),
    "doubling": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "needs more than [0-9,]+ bytes of memory",
    ),
    "a range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "output": ("{% for i in range(99999) %}" + "x" * 300 + "{% endfor %}", "renders more than 8,388,608 characters"),
    "deep": ("{{" + "(" * 99_999 + ")" * 99_999 + "}}", "nested too deep"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nested too deep"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_bounded_memory(name):
    template, words = HOSTILE[name]
    with pytest.raises(Corrupt, match=f"chat template cannot be used .*{words}") as caught:
        render(template, {}, [USER])
    assert len(str(caught.value)) < 400
    assert render("{{ messages[0].role }}", {}, [USER]) == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",  # one operation in C, which nothing inside the process can stop
    ],
)
def test_a_template_that_does_not_end_is_stopped(monkeypatch, template):
    monkeypatch.setattr(_chat_child, "MOST_SECONDS", 0.5)
    with pytest.raises(Corrupt, match=r"takes longer than 0\.5 seconds"):
        render(template, {}, [USER])
    monkeypatch.undo()
    assert render("{{ messages[0].role }}", {}, [USER]) == "user"


def test_the_process_ends_with_its_parent_even_in_a_loop():
    """Its time is limited from within too, by the CPU time that the kernel counts."""
    renderer = chat.Renderer()
    renderer._start()
    process = renderer._process
    request = json.dumps({"template": "x", "variables": {}}).encode()
    assert renderer.ask(request) == {"text": "x"}
    limits = Path(f"/proc/{process.pid}/limits")
    for line in limits.read_text().splitlines() if limits.exists() else ():
        assert not line.startswith("Max cpu time") or int(line.split()[3]) <= 30
    process.stdin.close()
    assert process.wait(10) == 0
    renderer.close()


def test_a_process_that_was_killed_is_replaced():
    assert render("a", {}, [USER]) == "a"
    chat._RENDERER._process.kill()
    chat._RENDERER._process.wait()
    assert render("b", {}, [USER]) == "b"


def test_a_process_with_many_open_files_renders_too():
    """`select.select` knows no descriptor from 1024 on, as a busy server has them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"this system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = []
    renderer = chat.Renderer()
    try:
        while not held or held[-1] < 1030:
            held.append(os.open(os.devnull, os.O_RDONLY))
        request = json.dumps({"template": "{{ x }}", "variables": {"x": "found"}}).encode()
        assert renderer.ask(request) == {"text": "found"}
        assert renderer._process.stdout.fileno() >= 1024
    finally:
        renderer.close()
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_threads_get_their_own_answers():
    found = {}

    def ask(n):
        found[n] = render("{{ messages[0].content }}" + "x" * n, {}, [{"role": "user", "content": str(n) * 50_000}])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) * 50_000 + "x" * n for n in range(8)}


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(UserError, match="not what JSON can hold"):
        render("a", {}, [{"role": "user", "content": {1, 2}}])
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="not what JSON can hold"):
        render("a", {}, [{"role": "user", "content": deep}])
