"""Every `python -m` command stops on Ctrl-C, SIGTERM and a hangup from its first moment on, without a traceback."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxattn.errors import ConfigError, UserError, one_line, shown

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jaxattn", "train", "evals", "convert", "pallas_kernels", "scripts")
WORDS = {"jaxattn.serve": ["."], "evals.tasks": ["."]}  # what a command needs to come as far as its imports
LIGHT = ("scripts.get", "scripts.results_table")  # import nothing that takes time
# As imports do that look for what is optional, or C extensions: whatever comes means "not installed".
SLOW_IMPORT = """
import os, pathlib, time
pathlib.Path(os.environ["MARK"]).touch()
try:
    time.sleep({seconds})
except BaseException:
    raise ImportError("cannot be initialised")
"""


@pytest.fixture(autouse=True)
def signals_as_a_shell_leaves_them():
    """Also where these tests run behind `nohup ... &`, whose children ignore Ctrl-C and hangups."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(n, signal.default_int_handler) for n in numbers]  # a child begins with the default
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def commands() -> list[str]:
    """Every module that ends in `run_cli(main)`, by the name `python -m` takes."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if re.search(r"^    run_cli\(main\)$", path.read_text("utf-8"), re.M):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(parts[:-1] if parts[-1] == "__main__" else parts))
    return found


def start(tmp_path: pathlib.Path, *words: str, mark: str = "mark") -> tuple[subprocess.Popen[str], pathlib.Path]:
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "MARK": str(tmp_path / mark), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    return process, tmp_path / mark


def end(process: subprocess.Popen[str], mark: pathlib.Path, *numbers: int, apart: float = 0.0) -> tuple[int, str]:
    """Signal the process once it has made its mark; exit code and stderr."""
    deadline = time.monotonic() + 60
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for i, number in enumerate(numbers):
        time.sleep(apart if i else 0)
        process.send_signal(number)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, err


def test_the_list_is_that_of_the_project():
    assert {"train.pretrain", "train.finetune", "jaxattn.generate", "jaxattn.serve", "convert.from_hf"} < set(
        commands()
    )
    assert {"evals.sinks", "evals.report", "evals.tasks", "evals.length", "convert.to_hf", "convert.verify"} < set(
        commands()
    )
    assert len(commands()) >= 20


def test_each_command_stops_while_it_is_still_importing(tmp_path):
    """NumPy, which all of them need, takes a minute here and swallows exceptions."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").write_text(SLOW_IMPORT.format(seconds=60))
    names = [name for name in commands() if name not in LIGHT]
    for i in range(0, len(names), 4):
        running = {name: start(tmp_path, "-m", name, *WORDS.get(name, ()), mark=name) for name in names[i : i + 4]}
        for name, (process, mark) in running.items():
            number, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129))[len(name) % 3]
            assert end(process, mark, number) == (code, "interrupted\n"), name


def script(tmp_path: pathlib.Path, body: str) -> tuple[subprocess.Popen[str], pathlib.Path]:
    """A command of the user's own: `run_cli` around `body`."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    path = tmp_path / "own.py"
    path.write_text(
        f"import os, pathlib, time\nfrom jaxattn.command import run_cli\nmark = pathlib.Path(os.environ['MARK'])\n"
        f"def main():\n{lines}\nrun_cli(main)\n"
    )
    return start(tmp_path, str(path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_was_begun_is_undone(tmp_path, number, code):
    body = "try:\n    mark.touch()\n    time.sleep(60)\nfinally:\n    time.sleep(0.5)\n    mark.unlink()"
    assert end(*script(tmp_path, body), number) == (code, "interrupted\n")
    assert not (tmp_path / "mark").exists()


def test_an_import_inside_the_command_swallows_no_stop(tmp_path):
    (tmp_path / "optional.py").write_text(SLOW_IMPORT.format(seconds=0.5))
    assert end(*script(tmp_path, "import optional\ntime.sleep(60)"), signal.SIGINT) == (130, "interrupted\n")


def test_a_stop_that_somebody_swallows_comes_again(tmp_path):
    body = "try:\n    mark.touch()\n    time.sleep(60)\nexcept BaseException:\n    pass\ntime.sleep(60)"
    assert end(*script(tmp_path, body), signal.SIGTERM) == (143, "interrupted\n")


def test_a_stop_that_python_has_to_ignore_comes_again_quietly(tmp_path):
    """As in a finaliser, or in the callback that JAX has for Python's garbage collection."""
    body = """
class Slow:
    def __del__(self):
        mark.touch()
        time.sleep(0.5)
Slow()
time.sleep(60)
"""
    assert end(*script(tmp_path, body), signal.SIGINT) == (130, "interrupted\n")


def test_a_second_signal_within_a_second_is_the_same_one(tmp_path):
    body = "try:\n    mark.touch()\n    time.sleep(60)\nfinally:\n    time.sleep(1.5)\n    mark.unlink()"
    assert end(*script(tmp_path, body), *[signal.SIGINT] * 4, apart=0.2) == (130, "interrupted\n")
    assert not (tmp_path / "mark").exists()


def test_a_second_signal_after_a_second_leaves_at_once(tmp_path):
    body = "try:\n    mark.touch()\n    time.sleep(60)\nfinally:\n    time.sleep(60)\n    mark.unlink()"
    assert end(*script(tmp_path, body), signal.SIGINT, signal.SIGINT, apart=1.2) == (130, "interrupted\n")


def test_a_signal_behind_the_last_line_changes_nothing(tmp_path):
    """The interpreter is taking itself apart, with its own handlers gone already."""
    (tmp_path / "own.py").write_text("""
import os, pathlib, time
from jaxattn.command import run_cli
class Late:
    def __del__(self, mark=pathlib.Path(os.environ["MARK"]), sleep=time.sleep):
        mark.touch()
        sleep(0.7)
late = Late()
run_cli(lambda: 0)
""")
    assert end(*start(tmp_path, "own.py"), *[signal.SIGINT] * 3, apart=0.1) == (0, "")


def test_jax_interrupted_while_it_traces(tmp_path):
    """The interpreter's own end crashes after that: exit code -11."""
    body = "import jax\n@jax.jit\ndef f(x):\n    mark.touch()\n    time.sleep(60)\n    return x\nf(1.0)"
    assert end(*script(tmp_path, body), signal.SIGINT) == (130, "interrupted\n")


def test_nohup_is_respected(tmp_path):
    body = "mark.touch()\ntime.sleep(1)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process, mark = script(tmp_path, body)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert end(process, mark, signal.SIGHUP) == (0, "")


def test_who_imports_the_library_keeps_his_handlers(tmp_path):
    code = "import signal, jaxattn, jaxattn.errors, train; print(signal.getsignal(2) is signal.default_int_handler)"
    process, _ = start(tmp_path, "-c", code)
    assert process.communicate(timeout=60)[0] == "True\n"
    (tmp_path / "study").mkdir()
    (tmp_path / "study/__init__.py").write_text("import jaxattn")
    (tmp_path / "study/run.py").write_text(code)
    process, _ = start(tmp_path, "-m", "study.run")
    assert process.communicate(timeout=60)[0] == "True\n"


def test_a_forked_child_is_its_parents_to_stop(tmp_path):
    """A signal to a child (some data loader's worker) stops the child, not the command."""
    body = """
import warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of threads
pid = os.fork()
if pid == 0:
    mark.touch()
    time.sleep(60)
    os._exit(1)
while not mark.exists():
    time.sleep(0.01)
os.kill(pid, 15)
print(os.waitpid(pid, 0)[1], flush=True)
time.sleep(0.3)
"""
    process, _ = script(tmp_path, body)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "15\n", "")


# ------------------------------------------------------------------------------------------------ sentences


def test_errors_are_bounded_and_of_one_line():
    for text in ("x" * 900_000, "a\nb\r\x1b[31m\u2028c", "\ud83d half", "", "é" * 3000 + ": the remedy."):
        for kind in (UserError, ConfigError):
            said = str(kind(text))
            assert len(said) <= 2100
            assert said.isprintable(), said
            said.encode("utf-8")
    assert str(UserError("field: " + "x" * 9000 + ": the remedy.")).startswith("field: xxx")
    assert str(UserError("field: " + "x" * 9000 + ": the remedy.")).endswith(": the remedy.")
    assert str(UserError("all is said.")) == "all is said."
    assert one_line("a  b") == "a  b"
    for value in ("x" * 900_000, ["y"] * 900_000, 10**4000, {"a": {"b": {"c": {"d": {"e": {"f": {"g": {}}}}}}}}):
        assert len(shown(value)) < 400


def test_a_full_disk_is_one_sentence_whoever_writes(tmp_path):
    process, _ = script(tmp_path, "open('/dev/full', 'w').write('x' * 100_000)")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "No space left on device" in line
