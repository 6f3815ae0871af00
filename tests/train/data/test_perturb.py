"""Replaced tokens: in the stream, before inputs and targets are shifted apart."""

import numpy as np
import pytest

from jaxattn.errors import ConfigError
from train.data.perturb import parse_perturbation


def batches_of(source, count=6):
    iterator = source.train_iterator()
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("fields", [{}, {"packing": "best_fit"}, {"source": "bb"}])
def test_fixed(source_of, fields):
    for plain, edited in zip(
        batches_of(source_of(**fields)), batches_of(source_of(**fields, perturb="fixed=17@0,2")), strict=True
    ):
        tokens, targets = plain["tokens"].copy(), plain["targets"].copy()
        for p in (0, 2):
            tokens[:, p] = np.where(plain["segment_ids"][:, p] > 0, 17, tokens[:, p])
        targets[:, 1] = np.where(plain["loss_mask"][:, 1], 17, targets[:, 1])
        np.testing.assert_array_equal(edited["tokens"], tokens)
        np.testing.assert_array_equal(edited["targets"], targets)
        for name in ("positions", "segment_ids", "loss_mask"):
            np.testing.assert_array_equal(edited[name], plain[name])


@pytest.mark.parametrize("fields", [{}, {"packing": "best_fit"}, {"source": "bb"}])
def test_random(source_of, fields):
    a, b = (batches_of(source_of(**fields, perturb="random@0", batch_size=32), 8) for _ in range(2))
    drawn = np.concatenate([x["tokens"][:, 0] for x in a])
    np.testing.assert_array_equal(drawn, np.concatenate([x["tokens"][:, 0] for x in b]))
    ordinary = 65 if fields.get("source") == "bb" else 256
    assert drawn.max() < ordinary
    assert len(set(drawn)) > ordinary / 3
    other = batches_of(source_of(**fields, perturb="random@0", batch_size=32, seed=4), 8)
    assert (np.concatenate([x["tokens"][:, 0] for x in other]) != drawn).any()


def test_padding_stays(source_of):
    source = source_of(["ab"] * 5, packing="best_fit", batch_size=1, val_fraction=0, perturb="fixed=17@14,15")
    batches = batches_of(source, 4)
    assert any((b["segment_ids"][:, 14:] == 0).any() for b in batches)
    for b in batches:
        padding = b["segment_ids"] == 0
        assert not b["tokens"][padding].any()
        assert not b["targets"][padding].any()
    short = batches_of(source_of(["ab"], batch_size=1, val_fraction=0, perturb="fixed=17@9"), 2)
    assert all((b["tokens"] != 17).all() for b in short)


def test_special_tokens_are_never_drawn():
    perturb = parse_perturbation("random@0", context=4, vocab=3, special=0)
    drawn = perturb.draw(np.random.default_rng(0), 200)
    assert set(drawn) == {1, 2}
    assert set(parse_perturbation("random@0", context=4, vocab=3).draw(np.random.default_rng(0), 200)) == {
        0,
        1,
        2,
    }


@pytest.mark.parametrize("source", ["bb", None])
def test_held_out_and_validation(source_of, source):
    fields = {"perturb": "fixed=17@1,12"} | ({"source": source} if source else {})
    made = source_of(**fields)
    out, plain = made.held_out(5, 8), made.held_out(5, 8, perturbed=False)
    assert (out[:, 1] == 17).all()
    np.testing.assert_array_equal(np.delete(out, 1, 1), np.delete(plain, 1, 1))
    assert (made.val_batches(1)[0]["tokens"][:, 1] == 17).all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("random", "is not understood: write"),
        ("random@", "is not understood"),
        ("fixed@1", "is not understood"),
        ("random@-1", "is not understood"),
        ("random@0,16", "position 16 is outside context=16"),
        ("fixed=99@0", "token 99 is outside the vocabulary of 65"),
    ],
)
def test_refusals(source_of, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        source_of(source="bb", perturb=text)
