"""`python -m jaxattn.serve` as a process: it says where it listens, refuses in one sentence, and ends on Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.generate.helpers import byte_run
from tests.in_process import called

ROOT = Path(__file__).resolve().parents[2]


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxattn.serve", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.smoke
def test_it_serves_and_ends_on_ctrl_c_in_the_middle_of_a_stream(tmp_path):
    process = start(str(byte_run(tmp_path)), "--port=0", "--context=4000", "--slots=1")
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = {"prompt": "a", "max_tokens": 3900, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            next(response.iter_lines())
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        assert "Traceback" not in err, err
    finally:
        process.kill()


@pytest.mark.optimised
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no Linux")
def test_it_holds_half_a_gigabyte_beside_weights_and_caches(tmp_path):
    """At any time, with weights and caches of a few megabytes."""
    process = start(str(byte_run(tmp_path)), "--port=0", "--context=200", "--slots=8")
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        started = held(process.pid)
        for prompt in ("a", "b" * 90):
            body = {"prompt": prompt, "max_tokens": 40}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        now = held(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert now["VmHWM"] < 500e6
    assert started["RssFile"] < 60e6 < now["VmHWM"]  # what only starting needed is gone, and was there


def held(process: int) -> dict[str, int]:
    """Bytes of a process, by the kernel's names."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest}


def test_what_it_cannot_do_is_one_sentence(tmp_path):
    (tmp_path / "trained").mkdir()
    run = byte_run(tmp_path / "trained")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, expected in (
            ((str(tmp_path), f"--port={port}"), "cannot be listened on"),
            ((str(tmp_path / "none"), "--port=0"), "config.json is missing"),
            ((str(tmp_path), "--max-body=0"), "--max-body is 0"),
            ((str(run), "--port=0", "--context=0"), "context is 0"),
        ):
            done = called("jaxattn.serve", *words)
            assert done.returncode == 2, done.stderr
            assert expected in done.stderr.strip().splitlines()[-1], done.stderr
