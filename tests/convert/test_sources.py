"""What is downloaded from the hub, and what is said when that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.sources import open_source
from jaxattn.errors import DataError, UserError
from jaxattn.open_tokenizer import load_tokenizer

huggingface_hub = pytest.importorskip("huggingface_hub")


class OfTheHttpLibrary(Exception):
    """As httpx's ProxyError: no OSError."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OfTheHttpLibrary("407 Proxy\nAuthentication Required"), r"\(407 Proxy Authentication Required\)"),
        (OfTheHttpLibrary(), r"\(OfTheHttpLibrary\)"),
        (OSError(), r"\(OSError\)"),
        (ValueError("no\x1bsuch"), r"\(no such\)"),
    ],
)
def test_whatever_the_client_raises_is_one_sentence(error, reason, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"could not be downloaded {reason}; check the name"):
        open_source("some/model")
    with pytest.raises(DataError, match=f"cannot be fetched {reason}: check the name"):
        load_tokenizer("hf:some/model")


def test_only_what_is_read_is_downloaded(tmp_path, monkeypatch):
    """By the client's own filter: not the other formats that a repository holds as well."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "additional_chat_templates/tool.jinja",
    ]
    other = [
        "consolidated.safetensors",
        "model/other.safetensors",
        "onnx/model.safetensors",
        "models-4bit/model.safetensors",
        "onnx/config.json",
        "pytorch_model.bin",
        "modeling_own.py",
    ]
    asked = []

    def snapshot_download(name, *, allow_patterns, ignore_patterns=None):
        asked.extend(
            filter_repo_objects(wanted + other, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert Path(open_source("some/model").origin) == tmp_path
    assert asked == wanted
