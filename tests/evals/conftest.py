"""What several tests of the harness need."""

from __future__ import annotations

import pytest


@pytest.fixture
def small_index(monkeypatch):
    """Without the harness's 14,000 tasks, which take seconds to list; the tests bring their own."""
    from evals import harness

    manager = harness.TaskManager
    own = lambda include_path: manager(include_path=include_path, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", own)
