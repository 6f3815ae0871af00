"""Tiny corpora; every test has a cache folder of its own."""

import json

import numpy as np
import pytest

from train.data import DataConfig, make_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A private cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXATTN_CACHE", str(folder))
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(texts) -> path of a jsonl file with one record per text."""

    def write(texts, name="corpus.jsonl", field="text"):
        path = tmp_path / name
        lines = (json.dumps({field: text}, ensure_ascii=False) for text in texts)
        path.write_text("".join(line + "\n" for line in lines), "utf-8")
        return str(path)

    return write


@pytest.fixture
def texts():
    """60 documents of 1 to 80 letters, all different."""
    rng = np.random.default_rng(7)
    return [f"{i:02d}" + "".join(rng.choice(list("abcdef"), rng.integers(1, 80))) for i in range(60)]


@pytest.fixture
def source_of(write_jsonl, texts):
    """source_of(**fields) -> a byte-level source over `texts`, T=16, B=4."""

    def make(docs=None, *, seed=3, data_seed=0, process_index=0, process_count=1, **fields):
        given = {"tokenizer": "bytes", "context": 16, "batch_size": 4, "val_fraction": 0.2, "seed": data_seed} | fields
        if "source" not in given:
            given["source"] = write_jsonl(texts if docs is None else docs)
        cfg = DataConfig(**given)
        return make_source(cfg, seed=seed, process_index=process_index, process_count=process_count)

    return make


@pytest.fixture
def same():
    """same(a, b): two batches agree bit for bit, in names, dtypes and values."""

    def check(a, b):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)

    return check
