"""Shared settings: CPU, a persistent compilation cache, warnings as errors on the newest JAX."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's and BLAS's threads wait for each other by burning CPU
if sys.version_info >= (3, 12):  # where JAX simulates GPUs: a simulated warpgroup holds one of JAX's threads
    os.environ.setdefault("NPROC", "8")
CACHE = Path(os.environ.get("JAXATTN_TEST_CACHE", Path(tempfile.gettempdir()) / f"jaxattn-tests-{os.getuid()}"))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))

# Most of this suite's time is compilation of programs that run for milliseconds. These hold in processes that tests
# start, too. XLA's older emitters compile in half the time; newer jaxlibs have no choice of them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
GIVEN_FLAGS = os.environ.get("XLA_FLAGS", "").replace(QUICK, "").strip()  # xdist's workers inherit them
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{GIVEN_FLAGS} {QUICK}".strip()
gc.set_threshold(100_000, 20, 100)  # tracing makes many objects and no garbage

import jax
import pytest

jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)  # to write them takes long, too
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

TESTS = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "dist", "no") == "load":  # what `-n` means: each file on one worker, because two would
        config.option.dist = "loadfile"  # compile the same programs and train the same models
    if jax.__version_info__ >= (0, 11):
        config.addinivalue_line("filterwarnings", "error")
        # Third parties warning about each other; nothing of ours may be listed here.
        for exempt in (
            "ignore:.*unclosed.*:ResourceWarning",
            "ignore::pytest.PytestUnraisableExceptionWarning",
        ):
            config.addinivalue_line("filterwarnings", exempt)


@pytest.fixture(scope="session")
def cache_root() -> Path:
    """A folder that outlives one test session, for tokenizers and compiled programs."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


@pytest.fixture(autouse=True)
def small_programs_compile_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Without LLVM's costly passes: two thirds of the time of most tests is compilation.

    A test that reads the compiled program (its memory, its text) is marked `optimised`: it and the processes it starts
    compile as users' programs are compiled, and so do the tests that compile for chips.
    """
    real = request.node.get_closest_marker("optimised") is not None or Path(request.path).parent.name == "aot"
    if real:
        monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        monkeypatch.setenv("XLA_FLAGS", GIVEN_FLAGS)
    jax.config.update("jax_disable_most_optimizations", not real)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


MAPPINGS = Path("/proc/self/maps")
MAPPINGS_ALLOWED = 30_000  # of the kernel's 65,530 a process, which holds about 5 GB then; letting go takes seconds


@pytest.fixture(autouse=True)
def compiled_programs_are_let_go(request: pytest.FixtureRequest):
    """XLA maps memory for every program it compiles; past the kernel's limit the process dies without a word.

    Looked at after every 16th test, because reading the list takes a few milliseconds.
    """
    yield
    request.config.stash[TESTS] = count = request.config.stash.get(TESTS, 0) + 1
    if count % 16 == 0 and MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MAPPINGS_ALLOWED:
        jax.clear_caches()
        gc.collect()
