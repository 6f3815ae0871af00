"""What several tests of the harness need."""

from __future__ import annotations

import pytest


@pytest.fixture
def small_index(monkeypatch):
    """Without the harness's 14,000 tasks, which take seconds to list; the tests bring their own. Nor is this machine
    described in each result."""
    import lm_eval.evaluator

    from evals import harness

    manager = harness.TaskManager
    own = lambda **options: manager(**options | {"include_defaults": False})
    for module in (harness, lm_eval.evaluator):
        monkeypatch.setattr(module, "TaskManager", own)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture(scope="session")
def twin(request, tmp_path_factory):
    """Both models of the harness on a checkpoint of the style that the test names."""
    pytest.importorskip("torch", reason="the oracle")
    pytest.importorskip("lm_eval", reason="extra eval")
    from tests.evals.harness_twin import make_twin

    return make_twin(request.param, tmp_path_factory.mktemp(request.param))
