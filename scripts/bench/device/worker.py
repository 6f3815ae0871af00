"""A process that does one task after another for `workers`, so that whatever goes wrong ends this process only.

Reads a JSON line for each task from standard input and writes one for each answer to the file descriptor given;
what tasks print goes to a log. Ends with its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from scripts.bench.device.tasks import perform


def end_with(parent: int) -> None:
    """Kills this process and its children once the parent is gone, whatever it is waiting for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    print(json.dumps({"status": "ok"}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(perform(asked["task"], asked["arguments"])), file=answers)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
