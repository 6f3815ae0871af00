"""What README and CONTRIBUTING print as Python runs as it stands, in the order in which it is read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxattn import mechanisms, registry
from jaxattn.errors import ConfigError
from jaxattn.models import ModelConfig
from tests.train.helpers import tiny
from train.pretrain import run

ROOT = Path(__file__).parents[1]


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text("utf-8"), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader would be: with the run that README's first command leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run(tiny(Path("runs/bb-softmax-seed0"), steps=2))
    return tmp_path


def test_the_library_snippets_of_readme_run(folder):
    names: dict = {}
    code = snippets("README.md")
    assert len(code) >= 2
    for text in code:
        exec(compile(text, "README.md", "exec"), names)
    assert names["o"].shape == names["q"].shape
    assert names["logits"].shape[-1] == names["cfg"].vocab_size
    assert names["new"].shape[1] == 8
    assert names["rows"].values.shape[-1] == names["tokens"].shape[1] + names["rows"].slots
    assert names["first"].shape == names["rows"].values.shape[:2]
    assert len(names["losses"]) == 2


def test_the_command_generate_does_not_hide_the_function():
    """Python puts a module that is imported in the place of the function of its name."""
    import jaxattn
    import jaxattn.generate

    with pytest.raises(ConfigError, match="tokens are"):
        jaxattn.generate(ModelConfig(vocab_size=3), {}, [[]], max_new_tokens=1)


def test_looking_inside_a_run_takes_six_lines():
    (text,) = [text for text in snippets("README.md") if "open_trained(" in text]
    body = text.split("\n\n", 1)[1].strip().splitlines()
    assert len(body) == 6
    for name in ("open_trained", "look", "read_run"):
        assert name in text


def test_a_mechanism_outside_the_library_is_found_by_its_name(folder, monkeypatch):
    """CONTRIBUTING's module, as `JAXATTN_PLUGINS` brings it to every command."""
    (text,) = [text for text in snippets("CONTRIBUTING.md") if "register(" in text]
    (folder / "my_attention.py").write_text(text, "utf-8")
    monkeypatch.setenv("JAXATTN_PLUGINS", "my_attention")
    try:
        assert "my_relu" in mechanisms.names()
        own = mechanisms.get("my_relu")
        assert own.make_spec().__class__.__module__ == "my_attention"
        run(tiny(Path("runs/own"), steps=1, attn="my_relu"))
        from evals.sinks import held_out_of
        from jaxattn.analysis import look
        from jaxattn.runs.opened import open_trained

        found = open_trained("runs/own")
        (layer,) = look(found.model, found.params, held_out_of(found, 2)).attention
        np.testing.assert_allclose(layer.rebuild(), layer.heads_out, atol=1e-5)
    finally:
        mechanisms.unregister("my_relu")
        registry.forget_plugins()
        sys.modules.pop("my_attention", None)
