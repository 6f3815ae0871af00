"""The run on a GPU that nobody watches: what goes wrong costs its own case, and what is known is written down."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels.shapes import Shape
from pallas_kernels.typical_calls import CALLS
from scripts.bench.device import __main__ as command
from scripts.bench.device import environment, picture, plan, sections, speed, summary, torch_speed
from scripts.bench.device.plan import Case
from scripts.bench.device.run import RESULTS, Run
from scripts.bench.device.workers import LOST, Crew

TASKS = "tests.scripts.odd_tasks"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def crew(tmp_path):
    with Crew(tmp_path / "logs", {"jax0": {}, "jax1": {}, "torch": {}}) as crew:
        yield crew


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def pids_in(path: Path) -> list[int]:
    while not path.exists() or not path.read_text().strip():
        time.sleep(0.05)
    return [int(n) for n in path.read_text().split()]


# ------------------------------------------------------------------------------------------------- workers


def test_a_worker_goes_on_behind_refusals_and_is_a_new_process_behind_whatever_failed(crew):
    worker = crew["jax0"]
    first = worker.ask(f"{TASKS}:add", 30, a=2, b=3)
    assert (first["status"], first["sum"]) == ("ok", 5)
    assert worker.ask(f"{TASKS}:refuse", 30)["status"] == "refused"
    assert worker.ask(f"{TASKS}:absent", 30) | {"seconds": 0} == {
        "status": "absent", "reason": "no such package", "seconds": 0
    }  # fmt: skip
    assert worker.ask(f"{TASKS}:add", 30, a=1, b=1)["pid"] == first["pid"], "nothing was wrong with it"
    failed = worker.ask(f"{TASKS}:fail", 30)
    assert (failed["status"], failed["reason"]) == ("failed", "ArithmeticError: an error of two lines")
    assert gone([first["pid"]]), "its device may be spoilt"
    assert worker.ask(f"{TASKS}:add", 30, a=1, b=1)["pid"] != first["pid"]
    assert worker.starts == 2


def test_what_dies_says_how_and_its_last_words(crew):
    answer = crew["jax0"].ask(f"{TASKS}:crash", 30)
    assert answer["status"] == "died"
    assert re.search("signal SIGSEGV.*the last thing it said", answer["reason"])
    assert re.search("exit code 3", crew["jax0"].ask(f"{TASKS}:leave", 30)["reason"])


def test_what_hangs_is_killed_with_its_children(crew, tmp_path):
    begun = time.monotonic()
    answer = crew["jax0"].ask(f"{TASKS}:hang", 5, noted=str(tmp_path / "pids"))
    assert (answer["status"], answer["reason"]) == ("late", "no answer within 5 s: killed.")
    assert time.monotonic() - begun < 15
    assert gone(pids_in(tmp_path / "pids"))
    assert crew["jax0"].ask(f"{TASKS}:add", 30, a=1, b=1)["sum"] == 2


def test_what_does_not_start_is_given_up(crew, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    reasons = [crew["jax0"].ask(f"{TASKS}:add", 30, a=1, b=1)["reason"] for _ in range(3)]
    assert all("exit code 1" in reason for reason in reasons[:2])
    assert reasons[2] == "jax0 did not start 2 times in a row: see jax0.log."


def test_closing_the_crew_ends_who_is_waited_for_and_starts_nobody(crew, tmp_path):
    threading.Timer(2.0, crew.close).start()
    done: list[str] = []
    ask = lambda worker, n: done.append(worker.ask(f"{TASKS}:hang", 60, noted=str(tmp_path / f"{n}"))["status"])
    begun = time.monotonic()
    crew.share(ask, (["jax0", "jax1"], range(6)))
    assert time.monotonic() - begun < 30
    assert set(done) == {"died"}
    assert len(done) <= 4, "nothing is begun behind the end"


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    code = f"""
from pathlib import Path
from scripts.bench.device.workers import Worker
worker = Worker("one", Path({str(tmp_path)!r}), {{}})
worker.ask("{TASKS}:hang", 60, noted={str(tmp_path / "pids")!r})
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    pids = pids_in(tmp_path / "pids")
    parent.kill()
    parent.wait()
    assert gone(pids)


# --------------------------------------------------------------------------------------------- timed sections


class Scripted:
    """A worker that answers from tables.

    Args:
      table: contender -> seconds of its samples, or an answer that costs the process.
      unready: contender -> the answer to making it ready.
    """

    def __init__(self, table, log, unready=None):
        self.table, self.log, self.unready, self.starts, self.made = table, log, unready or {}, 1, 0

    def ask(self, task, limit, **asked):
        what = task.split(":")[1]
        if what == "make":
            self.made += 1
            return {"status": "ok", "contenders": list(self.table), "absent": {"fla": "is not installed"}}
        if what == "ready" and asked["contender"] in self.unready:
            answer = self.unready[asked["contender"]]
            self.starts += answer["status"] in LOST
            return answer
        if what != "sample":
            return {"status": "ok"}
        self.log.append(asked["contender"])
        sample = self.table[asked["contender"]].pop(0)
        if isinstance(sample, dict):
            self.starts += 1
            return sample
        return {"status": "ok", "seconds_a_call": sample}


def run_of(tmp_path, crew=None, **options):
    return Run(tmp_path / "out", crew, **{"minutes": 8.0, "small": False, "seed": 0, **options})


CASE = Case("forward T64", "attention", Shape("T64", 1, 64, 2, 2, 64, 64), {"backward": False}, flops=1e9)


def measured(tmp_path, jax_table, torch_table, unready=None):
    log: list[str] = []
    run = run_of(tmp_path)
    run.begin("attention")
    workers = Scripted(jax_table, log, unready), Scripted(torch_table, log)
    sides = [
        sections.Contenders(run, CASE, side, worker) for side, worker in zip(("jax", "torch"), workers, strict=True)
    ]
    sections.measure(run, CASE, sides)
    return run, log, workers


def test_contenders_take_turns_in_an_order_that_is_reversed(tmp_path):
    run, log, _ = measured(tmp_path, {"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [2.0] * 5}, {"c": [3.0] * 5})
    assert log == [*"abc", *"cba", *"abc", *"cba", *"abc"]
    (row,) = run.rows
    assert row["seconds_a_call"]["a"] == {"median": 3.0, "least": 1.0, "most": 5.0, "samples": 5}
    assert (row["status"], row["absent"]) == ("ok", {"fla": "is not installed"})


def test_a_contender_that_fails_is_left_out_and_the_others_of_its_process_are_set_up_again(tmp_path):
    bad = {"status": "late", "reason": "no answer within 20 s: killed."}
    run, log, (jax_worker, _) = measured(tmp_path, {"a": [1.0, bad], "b": [2.0] * 5}, {"c": [3.0] * 5})
    (row,) = run.rows
    assert log.count("a") == 2, "it is not asked again, though its process was set up again"
    assert row["seconds_a_call"]["b"]["samples"] == row["seconds_a_call"]["c"]["samples"] == 5
    assert jax_worker.made == 2
    assert (row["status"], row["absent"]["a"]) == ("late", bad["reason"])
    assert run.faults() == [row]


def test_a_contender_that_cannot_be_made_ready_costs_nobody_else_their_place(tmp_path):
    hung = {"status": "late", "reason": "no answer within 90 s: killed."}
    missing = {"status": "absent", "reason": "RuntimeError: no cuDNN"}
    table = {"ours": [2.0] * 5, "hangs": [], "cudnn": []}
    run, _, (jax_worker, _) = measured(tmp_path, table, {"c": [3.0] * 5}, {"hangs": hung, "cudnn": missing})
    (row,) = run.rows
    assert list(row["seconds_a_call"]) == ["ours", "c"]
    assert row["seconds_a_call"]["ours"]["samples"] == 5
    assert jax_worker.made == 2, "the process was another after the one that hung"
    reasons = {"hangs": hung["reason"], "cudnn": missing["reason"], "fla": "is not installed"}
    assert (row["status"], row["absent"]) == ("late", reasons)


def test_without_time_a_case_is_skipped_with_its_reason_and_results_are_on_the_disk(tmp_path):
    run = run_of(tmp_path, minutes=0.01)
    run.begin("attention")
    assert run.out_of_time("forward T64", shape={})
    (line,) = (tmp_path / "out" / RESULTS).read_text().splitlines()
    assert json.loads(line)["status"] == "skipped"
    assert json.loads(line)["reason"] == "no time left in the section attention"
    assert not run.faults()
    assert run_of(tmp_path, small=True).faults() == []
    run.small = True
    assert run.faults(), "a dry run does all of it"


def test_the_sections_take_eight_minutes_and_numbers_four_of_them():
    assert sum(plan.SECTIONS.values()) <= 60 * 8 + 60, "what one leaves is the next one's"
    assert plan.SECTIONS["numerics"] <= 240
    assert list(plan.SECTIONS) == list(sections.RUNS)
    for small in (True, False):
        jobs = plan.numerics(small)
        assert {name for name, _ in jobs} == {*CALLS, *plan.MORE}
        assert len(set(jobs)) == len(jobs)
        for make in (plan.roofs, plan.attention, plan.recurrence, plan.sparse):
            for case in make(small):
                assert case.family in speed.FAMILIES
                assert "torch" not in case.sides or case.family in torch_speed.FAMILIES


# ------------------------------------------------------------------------------------------------- the summary


def filled(tmp_path):
    """A run with a right, a wrong, a lost and a skipped case of everything."""
    run = run_of(tmp_path)
    run.begin("environment")
    run.write("run", status="ok", packages={"jax": "0.11.2"}, gpu="A GPU", python="3.12.3", commit="abc", ptxas={})
    run.write("jax", status="ok", device="A GPU", kernels="can be built")
    run.begin("numerics")
    common = {"op": "flash", "compile_s": 3.0, "finite": True, "errors": {"output 0": 0.5}}
    shape = lambda name: {"name": name, "length": 8, "dim": 64}
    run.write("a", status="ok", shape=shape("A"), worst=1e-3, moved=0.0, right=True, **common)
    run.write("b", status="ok", shape=shape("B"), worst=0.5, moved=0.0, right=False, xla={"output 0": 1e-3}, **common)
    run.write("c", status="ok", shape=shape("C"), worst=1e-3, moved=0.25, right=False, **common)
    run.write("d", status="died", shape=shape("D"), op="flash", reason="the process ended by signal SIGSEGV")
    run.begin("attention")
    seconds = lambda x: {"median": x, "least": 0.9 * x, "most": 1.1 * x, "samples": 5}
    timed = {"jaxattn softmax": seconds(0.002), "jaxattn sigmoid": seconds(0.001), "torch SDPA flash": seconds(0.004)}
    shape = {"name": "T8192_D128", "length": 8192, "dim": 128}
    for part in picture.PARTS:
        run.write(f"{part} T8192_D128", status="ok", shape=shape, flops=1e12, bytes=0.0, seconds_a_call=timed,
                  absent={"jax.nn cudnn": "RuntimeError: no cuDNN"}, differences={})  # fmt: skip
    run.begin("sparse")
    cache = {"jaxattn": seconds(0.001), "copy": seconds(0.002), "flash, dense": seconds(1e-6)}
    run.write("all pages", status="ok", shape=shape, flops=0.0, bytes=2e9, seconds_a_call=cache)
    run.begin("model")
    run.write("open", status="ok", weights="random, as no --gguf was given")
    run.write("1 × 8 + 8", status="skipped", reason="no time left in the section model")
    return run


def test_the_summary_says_what_is_wrong_where_and_why(tmp_path):
    run = filled(tmp_path)
    summary.write(run)
    text = (run.out / "summary.md").read_text()
    assert "Numbers: 1 of 4 right" in text
    assert (
        "| flash | 1.0e-03 (3 s) | 5.0e-01 (3 s) **WRONG** | 1.0e-03 (3 s) **DIFFERS FROM RUN TO RUN** | died |" in text
    )
    assert "softmax 2.00, sigmoid 4.00 × torch SDPA flash" in text
    assert "jaxattn sigmoid 1 (0.9 to 1.1) 1000 TFLOP/s, 90 % of the roof" in text, "the fastest sample is the roof"
    assert "copy 2 (1.8 to 2.2)," in text, "a copy's bytes are not those of the case"
    for reason in ("no cuDNN", "SIGSEGV", "no time left in the section model", "xla's worst 1.0e-03"):
        assert reason in text
    assert (run.out / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert len(text.splitlines()) < 60, "a page"


def test_a_run_that_was_cut_short_has_a_summary_too(tmp_path):
    run = run_of(tmp_path)
    summary.write(run)
    assert "no device" in (run.out / "summary.md").read_text()


# ----------------------------------------------------------------------------------------------- the command


def test_what_cannot_be_asked_for(monkeypatch, tmp_path, capsys):
    def refusal(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["device", *flags])
        with pytest.raises(command.UserError) as error:
            command.main()
        return str(error.value)

    assert refusal() == "--out is missing: name a folder for the results."
    assert refusal("--out", str(tmp_path), "--minutes=0") == "--minutes is 0 but must be more than 0."
    (tmp_path / RESULTS).touch()
    assert "holds the results of an earlier run: name another folder" in refusal("--out", str(tmp_path))
    assert refusal("--out", str(tmp_path / RESULTS)).endswith("a file: name a folder.")
    monkeypatch.setattr(sys, "argv", ["device", "--packages"])
    assert command.main() == 0
    assert "jaxtyping: " in capsys.readouterr().out


def test_a_dry_run_stopped_in_the_middle_leaves_results_a_summary_and_no_process(tmp_path):
    out = tmp_path / "out"
    flags = ["--dry-run", "--out", str(out), "--processes=1", "--only", "environment", "roofs", "numerics"]
    started = subprocess.Popen([sys.executable, "-m", command.__package__, *flags], cwd=ROOT, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)  # fmt: skip
    assert started.stdout is not None
    for line in started.stdout:
        if "roofs: copies" in line:
            break
    time.sleep(1.0)
    workers = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/stat")
               if p.exists() and p.read_text().split(") ")[-1].split()[1] == str(started.pid)]  # fmt: skip
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    assert started.returncode == 143
    assert workers
    assert gone(workers)
    rows = [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]
    assert {row["section"] for row in rows} >= {"environment", "roofs"}
    assert all(row["seconds_a_call"] for row in rows if row["section"] == "roofs")
    assert rows[0]["commit"] == environment.commit()
    assert "A dry run" in (out / "summary.md").read_text()


def packages_needed(names: tuple[str, ...]) -> set[str]:
    """Top-level files of distributions and of all that these require."""
    found, waiting = set(), list(names)
    while waiting:
        name = re.split(r"[ ;<>=!~\[(]", waiting.pop())[0]
        if name.lower() in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra, or for another system
        found.add(name.lower())
        waiting += [need for need in distribution.requires or [] if "extra ==" not in need]
    files = (f for n in found for f in importlib.metadata.distribution(n).files or [])
    return {f.parts[0] for f in files if f.parts[0] not in ("..", "__pycache__", "bin")}


def test_nothing_is_needed_but_the_packages_that_it_names(tmp_path):
    """Of the machine with the GPU, to which nothing can be downloaded."""
    site = Path(np.__file__).parents[1]
    for name in packages_needed(environment.NEEDED):
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    modules = [f"scripts.bench.device.{m}" for m in ("__main__", "numerics", "speed", "model")]
    code = f"import {', '.join(modules)}; import sys; print(sorted(m for m in sys.modules if m == 'matplotlib'))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------- numerics, on a kernel of xla


def test_numerics_see_a_wrong_number_and_one_that_moves(monkeypatch):
    """The kernel's place is taken by the reference, right, wrong, or different each time it is run."""
    from scripts.bench.device import numerics

    shape = Shape("T20", 1, 20, 2, 1, 8, 8)
    bind = numerics._both
    noise = iter(range(1, 100))

    def taken(spoil):
        def both(task, backend):
            f = bind(task, "reference")
            return (lambda *x: spoil(f(*x))) if backend == "gpu" else f

        monkeypatch.setattr(numerics, "_both", both)
        return numerics.check("flash", vars(shape), 0, simulated=False)

    right = taken(lambda parts: parts)
    assert right["right"]
    assert right["moved"] == 0.0
    assert set(right["errors"]) == {"output 0", "gradient 0", "gradient 1", "gradient 2"}
    wrong = taken(lambda parts: parts | {"gradient 1": parts["gradient 1"].at[0, 3, 0, 0].add(1.0)})
    assert not wrong["right"]
    assert wrong["errors"]["gradient 1"] > 0.1 > wrong["errors"]["gradient 0"]
    assert wrong["xla"]["gradient 1"] < 0.05
    lost = taken(lambda parts: parts | {"output 0": parts["output 0"] * np.nan})
    assert (lost["right"], lost["finite"], lost["worst"] >= 1e29) == (False, False, True)
    jitter = lambda x: jax.pure_callback(lambda: np.float32(1e-3 * next(noise)), jax.ShapeDtypeStruct((), "float32"))
    moved = taken(lambda parts: parts | {"output 0": parts["output 0"] * (1 + jitter(0))})
    assert not moved["right"]
    assert moved["moved"] > 0
