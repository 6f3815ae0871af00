"""One registry for everything that is chosen by name: its sentences, its types, and what others add to it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

import numpy as np
import pytest

from jaxattn import registry
from jaxattn.errors import ConfigError
from jaxattn.registry import Registry, make_spec, parse_call, parse_list


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every type that a field may have."""

    sinks: int = 4
    share: float = 1
    exact: bool = False
    keep: str = "new"
    form: Literal["a", "b"] = "a"
    layers: tuple[int, ...] = ()
    window: int | None = None
    counts: int | tuple[int, ...] = 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """A kind of thing that is chosen by name."""

    name: str
    spec: type = Options


STREAMING = Policy("streaming")
PLACES = {"streaming": "test_registry:STREAMING", "dense": "test_registry:DENSE"}
DENSE = Policy("dense")


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> Registry[Policy]:
    """A registry whose package is the folder of this file."""
    monkeypatch.setitem(sys.modules, "mine.test_registry", sys.modules[__name__])
    return Registry("policy", "mine", PLACES, Policy, reserved=("none",), lists=True)


def test_a_name_is_found_and_brings_its_options(policies: Registry[Policy]) -> None:
    assert policies.names() == ["dense", "streaming"]
    record, spec = policies.resolve("streaming(sinks=2, layers=[0, 3], keep=old)")
    assert record is STREAMING
    assert spec == Options(sinks=2, layers=(0, 3), keep="old")
    assert "dense" in policies
    assert "none" not in policies


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("streming", "policy 'streming' is not known: did you mean 'streaming'? choose one of dense, streaming."),
        ("streming", "One that is kept outside the library: name its module in JAXATTN_PLUGINS."),
        ("streaming(sink=1)", "streaming has no option 'sink'; did you mean 'sinks'? its options are: sinks, share,"),
        ("streaming(sinks=2.5)", "streaming.sinks is 2.5 but must be a whole number."),
        ("streaming(sinks=True)", "streaming.sinks is True but must be a number."),
        ("streaming(sinks=[1])", "streaming.sinks is [1] but must be a number."),
        ("streaming(sinks=3000000000)", "streaming.sinks is 3000000000 but must be at most 2147483647 in size."),
        ("streaming(share=1e999)", "streaming.share is inf but must be a finite number."),
        ("streaming(exact=1)", "streaming.exact is 1 but must be True or False."),
        ("streaming(keep=1)", "streaming.keep is 1 but must be text."),
        ("streaming(form=1)", "streaming.form is 1 but must be text."),
        ("streaming(layers=1)", "streaming.layers is 1 but must be a list."),
        ("streaming(layers=[1, x])", "streaming.layers is [1, 'x'] but must be a list, each entry a number."),
        ("streaming(window=x)", "streaming.window is 'x' but must be a number."),
        ("streaming(counts=[1, 2.5])", "streaming.counts is [1, 2.5] but must be a list, each entry a whole number."),
        ("streaming(1)", "policy 'streaming(1)' is not NAME or NAME(option=value, ...): options are written"),
        ("streaming(sinks=1, sinks=2)", "sinks is given twice."),
        ("streaming(sinks=print(1))", "the value of sinks must be a number, a word, 'text', True or False, or a list"),
        ("streaming(", "policy 'streaming(' is not NAME or NAME(option=value, ...): "),
    ],
)
def test_what_cannot_be_is_one_sentence(policies: Registry[Policy], text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        policies.resolve(text)
    assert says in str(error.value)


def test_values_come_in_the_types_of_their_fields() -> None:
    made = make_spec("x", Options, {"sinks": 2.0, "share": 2, "layers": [np.int64(3), 4.0], "window": None})
    assert made == Options(sinks=2, share=2.0, layers=(3, 4))
    assert [type(v) for v in (made.sinks, made.share, *made.layers)] == [int, float, int, int]
    assert make_spec("x", Options, {"sinks": np.float32(3)}).sinks == 3
    assert make_spec("x", Options, {"counts": [2, 3]}).counts == (2, 3)
    assert make_spec("x", Options, {"counts": 2}).counts == 2
    assert make_spec("x", Options, {"sinks": 2.5}, typed=False).sinks == 2.5  # such a dataclass judges them itself


def test_annotations_that_cannot_be_read_leave_the_defaults_types() -> None:
    class Unknown:
        pass

    @dataclasses.dataclass(frozen=True)
    class Local:
        sinks: int = 4
        other: Unknown | None = None

    assert make_spec("x", Local, {"sinks": 3.0}).sinks == 3
    with pytest.raises(ConfigError, match=r"x.sinks is 'a' but must be a number"):
        make_spec("x", Local, {"sinks": "a"})


def test_lists_of_names_have_one_text_each() -> None:
    assert parse_list("policy", "a, b(c=d, e=[f, 1])") == ("a", "b(c='d', e=['f', 1])")
    assert parse_list("policy", "a(b='c')") == parse_list("policy", "a(b=c)")
    with pytest.raises(ConfigError, match="policy ' ' is not NAME"):
        parse_list("policy", " ")
    with pytest.raises(ConfigError, match=r"the value of b must be a number, a word, 'text', True or False\."):
        parse_call("policy", "a(b=[1])")


def test_what_is_registered_is_known_until_it_is_forgotten(policies: Registry[Policy]) -> None:
    own = policies.register(Policy("mine"))
    assert policies.get("mine") is own
    assert policies.names() == ["dense", "mine", "streaming"]
    with pytest.raises(ConfigError, match="a policy named 'mine' exists: choose another name, or pass replace=True"):
        policies.register(Policy("mine"))
    with pytest.raises(ConfigError, match="a policy named 'dense' exists"):
        policies.register(Policy("dense"))
    other = policies.register(Policy("dense"), replace=True)
    assert policies.get("dense") is other
    policies.unregister("dense")
    assert policies.get("dense") is DENSE
    policies.unregister("mine")
    assert "mine" not in policies
    for name in ("none", "a-b", "class", ""):
        with pytest.raises(ConfigError, match=r"the policy's name .* must be a Python name other than none"):
            policies.register(Policy(name))
    with pytest.raises(ConfigError, match="register takes a Policy but was given 'dense'"):
        policies.register("dense")  # type: ignore[arg-type]


def test_records_that_are_classes_are_their_own_options() -> None:
    class Base:
        name = "base"

    @dataclasses.dataclass(frozen=True)
    class Task(Base):
        name = "task"
        digits: int = 4

    tasks: Registry[type[Base]] = Registry("task", "mine", {}, Base)
    tasks.register(Task)
    assert tasks.resolve("task(digits=2)") == (Task, Task(digits=2))
    with pytest.raises(ConfigError, match="register takes a Base but was given"):
        tasks.register(dict)  # type: ignore[arg-type]


def test_a_plugin_that_fails_is_named_and_tried_again(policies: Registry[Policy], monkeypatch, tmp_path) -> None:
    (tmp_path / "broken_policy.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(registry.PLUGINS, "broken_policy")
    with pytest.raises(ConfigError, match=r"'broken_policy' of JAXATTN_PLUGINS cannot be imported \(ZeroDivisionError"):
        policies.names()
    (tmp_path / "broken_policy.py").write_text("x = 1  # mended")
    assert policies.names() == ["dense", "streaming"]
    registry.forget_plugins()
