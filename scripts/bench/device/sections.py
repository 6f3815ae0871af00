"""What each section of a run asks of its workers, and the rows it writes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from pallas_kernels.shapes import Shape
from scripts.bench.device import environment as machine
from scripts.bench.device import plan
from scripts.bench.device.plan import Case
from scripts.bench.device.run import Run
from scripts.bench.device.workers import LOST, Answer, Worker

LIMIT = 90.0  # seconds of one numerics case, two compiles and the reference
SET_UP, SAMPLE = 90.0, 20.0


def environment(run: Run) -> None:
    """The machine, and each side of it; the first row of every file of results."""
    run.write("run", status="ok", seed=run.seed, minutes=run.minutes, small=run.small, **machine.machine())
    run.write("jax", **run.crew[run.jax[0]].ask("environment:jax_side", min(60.0, run.left())))
    run.write("torch", **run.crew["torch"].ask("environment:torch_side", min(60.0, run.left())))


def numerics(run: Run) -> None:
    """Every op against its reference, several at once: nothing is timed but compiling."""

    def check(worker: Worker, job: tuple[str, Shape]) -> None:
        name, shape = job
        case = f"{name} {shape.name}"
        if run.out_of_time(case, op=name, shape=vars(shape)):
            return
        asked = {"name": name, "shape": vars(shape), "seed": run.seed, "simulated": run.small}
        run.write(case, op=name, shape=vars(shape), **worker.ask("numerics:check", min(LIMIT, run.left()), **asked))

    run.crew.share(check, (run.jax, plan.numerics(run.small)))


def roofs(run: Run) -> None:
    timed(run, plan.roofs(run.small))


def attention(run: Run) -> None:
    timed(run, plan.attention(run.small))


def recurrence(run: Run) -> None:
    timed(run, plan.recurrence(run.small))


def sparse(run: Run) -> None:
    timed(run, plan.sparse(run.small))


def model(run: Run) -> None:
    worker = run.crew[run.jax[0]]
    opened = worker.ask("model:set_up", min(60.0, run.left()), gguf=run.gguf, tiny=run.small, seed=run.seed)
    run.write("open", **opened)
    for job in plan.model(run.small):
        case = f"{job['batch']} × {job['prompt']} + {job['new']}"
        if opened["status"] != "ok" or run.out_of_time(case, shape=job):
            return
        rounds = 1 if run.small else 3
        asked = {**job, "rounds": rounds, "seed": run.seed}
        run.write(case, shape=job, **worker.ask("model:speed", min(90.0, run.left()), **asked))


RUNS: dict[str, Callable[[Run], None]] = {
    f.__name__: f for f in (environment, numerics, roofs, attention, recurrence, sparse, model)
}


def timed(run: Run, cases: list[Case]) -> None:
    """Sets all cases up, several at once; then the contenders of each case are sampled in turn, nothing beside them."""
    ready: dict[tuple[str, str], Contenders] = {}  # by case and side

    def set_up(worker: Worker, job: tuple[Case, str]) -> None:
        case, side = job
        if run.left() > plan.LEAST:
            ready[case.name, side] = Contenders(run, case, side, worker)

    jobs = lambda side: [(case, side) for case in cases if side in case.sides]
    groups = [(names, jobs(side)) for names, side in ((run.jax, "jax"), (["torch"], "torch")) if jobs(side)]
    run.crew.share(set_up, *groups)
    for case in cases:
        if not run.out_of_time(case.name, shape=vars(case.shape)):
            measure(run, case, [ready[case.name, side] for side in case.sides if (case.name, side) in ready])


class Contenders:
    """Those of one case on one side, held by a worker since it was asked to make them ready."""

    def __init__(self, run: Run, case: Case, side: str, worker: Worker):
        self.run, self.case, self.worker = run, case, worker
        self.module = "torch_speed" if side == "torch" else "speed"
        self.names: list[str] = []  # that are ready
        self.absent: dict[str, str] = {}
        self.differences: dict[str, float] = {}
        self.fault: Answer | None = None
        self.set_up()

    def set_up(self) -> None:
        """Makes ready who is not absent. Who cost the process is, and the others begin anew in another."""
        while self.run.left() > 0:
            asked = {"family": self.case.family, "shape": vars(self.case.shape), **self.case.options}
            made = self._ask("make", SET_UP, **asked)
            if made["status"] != "ok":
                self.names, self.fault = [], made
                return
            self.generation = self.worker.starts
            self.absent = made["absent"] | self.absent
            self.names = [name for name in made["contenders"] if name not in self.absent]
            for name in list(self.names):
                answer = self._ask("ready", SET_UP, contender=name)
                if answer["status"] != "ok":
                    self._lose(name, answer)
                if answer["status"] in LOST:
                    break
            else:
                compared = self._ask("compare", SET_UP, contenders=self.names)
                self.differences = compared.get("differences", {})
                if compared["status"] != "ok":
                    self.names, self.fault = [], compared
                return
        self.names = []

    def sample(self, name: str) -> float | None:
        """Seconds of a call; None where there was no answer, as the row will say."""
        if self.names and self.generation != self.worker.starts:  # lost with what another case did to the process
            self.set_up()
        if name not in self.names:
            return None
        answer = self._ask("sample", SAMPLE, contender=name, least=0.0 if self.run.small else plan.LEAST)
        if answer["status"] == "ok":
            return answer["seconds_a_call"]
        self._lose(name, answer)
        return None

    def _lose(self, name: str, answer: Answer) -> None:
        self.names.remove(name)
        self.absent[name] = answer["reason"]
        if answer["status"] in LOST:
            self.fault = answer

    def _ask(self, what: str, limit: float, **asked: Any) -> Answer:
        limit = min(limit, max(1.0, self.run.left()))
        return self.worker.ask(f"{self.module}:{what}", limit, case=self.case.name, **asked)

    def drop(self) -> None:
        if self.names and self.generation == self.worker.starts:
            self._ask("drop", SAMPLE)


def measure(run: Run, case: Case, sides: list[Contenders]) -> None:
    """Samples of every contender, in an order that is reversed each round, as one row."""
    seconds: dict[str, list[float]] = {name: [] for side in sides for name in side.names}
    for n in range(2 if run.small else plan.ROUNDS):
        turns = [(side, name) for side in sides for name in list(side.names)]
        for side, name in turns if n % 2 == 0 else reversed(turns):
            if run.left() > 0 and (sample := side.sample(name)) is not None:
                seconds[name].append(sample)
    for side in sides:
        side.drop()
    faults = [side.fault for side in sides if side.fault]
    merged = lambda field: {k: x for side in sides for k, x in getattr(side, field).items()}
    row: dict[str, Any] = {
        "shape": vars(case.shape),
        "flops": case.flops,
        "bytes": case.bytes,
        "seconds_a_call": {name: summary(x) for name, x in seconds.items() if x},
        "absent": merged("absent"),
        "differences": merged("differences"),
    }
    status = faults[0]["status"] if faults else ("ok" if any(seconds.values()) else "skipped")
    reason = {"reason": faults[0]["reason"]} if faults else {}
    run.write(case.name, status=status, **reason, **row)


def summary(samples: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(samples), "least": min(samples), "most": max(samples), "samples": len(samples)}
