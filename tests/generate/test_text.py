"""Text streams, stop strings, chat templates and the command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jaxattn.chat import choose_template, read_templates, render
from jaxattn.errors import Corrupt, UserError
from jaxattn.open_tokenizer import byte_tokenizer
from jaxattn.text import TextStream, load
from tests.generate.helpers import byte_run
from tests.in_process import called


def pieces(text: str, stop=()):
    out = TextStream(byte_tokenizer(), stop)
    given = []
    for byte in text.encode():
        given.append(out.add([byte]))
        if out.stopped:
            return given
    return [*given, out.add((), last=True)]


def test_half_a_character_is_held_back():
    assert pieces("aé🙂b") == ["a", "", "é", "", "", "", "🙂", "b", ""]


def test_text_ends_before_a_stop_string_and_its_beginning_is_held_back():
    assert "".join(pieces("one two END three", ["END"])) == "one two "
    assert "".join(pieces("one two EN", ["END"])) == "one two EN"
    assert pieces("aEb", ["END"]) == ["a", "", "Eb", ""]


def test_broken_text_at_the_end_is_given_out():
    out = TextStream(byte_tokenizer())
    assert out.add([0xF0]) == ""
    assert out.add((), last=True) == "\ufffd"


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>{{ eos_token }}"


@pytest.mark.smoke
def test_a_template_is_rendered_with_the_special_tokens():
    found = render(TEMPLATE, {"eos_token": "</s>"}, [{"role": "user", "content": "hi"}])
    assert found == "<user>hi<assistant></s>"
    assert render("x{{ bos_token }}", {"eos_token": "</s>"}, []) == "x"


@pytest.mark.parametrize(
    ("template", "kind", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", UserError, "roles must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", Corrupt, "cannot be used"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", Corrupt, "cannot be used"),
        ("{% for %}", Corrupt, "cannot be used"),
        ("{{ messages[0]['content']['x']['y'] }}", UserError, "does not fit"),
    ],
)
def test_a_template_cannot_leave_its_sandbox(template, kind, message):
    with pytest.raises(kind, match=message):
        render(template, {}, [{"role": "user", "content": "hi"}])


def test_a_folder_without_a_template_is_named(tmp_path):
    with pytest.raises(UserError, match="has no chat template"):
        choose_template(read_templates(tmp_path), tmp_path)


@pytest.fixture
def run(tmp_path):
    return byte_run(tmp_path)


def command(*args):
    return subprocess.run([sys.executable, "-m", "jaxattn.generate", *args], capture_output=True, text=True)


@pytest.mark.smoke
def test_the_command_continues_a_text_and_refuses_bad_input(run, tmp_path):
    done = command(str(run), "--prompt", "some", "--max-new-tokens", "5", "--temperature", "0.7", "--top-k", "9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("some")
    assert "4 prompt tokens" in done.stderr
    for args, message in (
        ((str(run), "--prompt", "x", "--top-p", "7"), "top_p is 7.0"),
        ((str(run), "--prompt", "x", "--chat"), "has no chat template"),
        ((str(run), "--prompt", "x", "--system", "y"), "there is no --chat"),
        ((str(tmp_path / "none"), "--prompt", "x"), "holds no run"),
    ):
        done = called("jaxattn.generate", *args)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_an_empty_prompt_starts_from_the_end_of_text(run):
    assert load(run).encode("") == [256]
