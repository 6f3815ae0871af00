"""The process in which chat templates are rendered: a file that runs by itself and imports no more than jinja2.

A template is a program from a stranger. Jinja's sandbox keeps it from files and from Python's insides, but not from
eating memory ('a' * 3000000000) or time (nested loops, 9**9**9): an operation in C can be neither counted nor stopped
from within. So this process has limits of its own, and whoever asks kills it when time is up.

Requests and answers are JSON behind eight bytes of length.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

MOST_BYTES = 512 << 20  # of address space
MOST_SECONDS = 5.0  # of a rendering
MOST_TEXT = 8 << 20  # characters of a prompt


def environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    import jinja2
    from jinja2 import ext, nodes, sandbox, utils

    class Generation(ext.Extension):
        """{% generation %} marks what the assistant wrote; for a prompt it is its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    class Dict:
        """`dict` without the attributes of a class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    class Namespace(utils.Namespace):
        """`namespace` without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, args = args[0], args[1:]
            values = dict(*args, **kwargs)
            for name in values:
                Namespace._check(name)
            utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace keeps no {name!r}")

    def refuse(message: object) -> None:
        raise Refused(str(message))

    def to_json(x: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = to_json
    names: dict[str, Any] = {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Namespace,
    }
    made.globals |= names
    return made


class Refused(Exception):
    """The template says that the messages do not suit it."""


def answer(compiled: Callable[[str], Any], request: dict[str, Any]) -> dict[str, str]:
    """The rendered text, or which of `refused`, `template` and `messages` is at fault and why."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    try:
        parts, size = [], 0
        for part in compiled(request["template"]).generate(**request["variables"]):
            parts.append(part)
            size += len(part)
            if size > MOST_TEXT:
                return {"template": f"it renders more than {MOST_TEXT:,} characters"}
        return {"text": "".join(parts)}
    except Refused as error:
        return {"refused": str(error)}
    except (TemplateSyntaxError, SecurityError, OverflowError) as error:
        return {"template": str(error)}
    except MemoryError:
        return {"template": f"it needs more than {MOST_BYTES:,} bytes of memory"}
    except RecursionError:
        return {"template": "it is nested too deep"}
    except Exception as error:  # noqa: BLE001  a template can raise anything
        return {"messages": str(error) or type(error).__name__}


def limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on this system; the deadline is left
        return
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time() -> None:
    """One more rendering's worth of CPU time: if whoever asked is gone, nobody else will stop this process."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + int(MOST_SECONDS) + 1, most))


def read(source: BinaryIO) -> Any:
    """The next message, None at the end."""
    head = source.read(8)
    return json.loads(source.read(int.from_bytes(head, "big"))) if len(head) == 8 else None


def write(target: BinaryIO, message: Any) -> None:
    raw = json.dumps(message).encode("ascii")
    target.write(len(raw).to_bytes(8, "big") + raw)
    target.flush()


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    compiled = functools.lru_cache(maxsize=4)(environment().from_string)
    limit_memory()
    write(target, {"text": "ready"})
    while (request := read(source)) is not None:
        limit_time()
        write(target, answer(compiled, request))


if __name__ == "__main__":
    main()
