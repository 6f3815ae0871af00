"""The packages beside `jaxattn`: whose `train` is it that an import finds?

Python takes the first file of that name on its path, and that of a script or a notebook begins with its own folder.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from jaxattn.errors import ShadowedError

SIBLINGS = ("pallas_kernels", "train", "evals", "convert")


def refuse_shadows(*names: str) -> None:
    """Refuse where the name of a package of this library means another file.

    Args:
      names: which of `SIBLINGS` are needed; none: all of them.

    Raises:
      ShadowedError: naming that file. While Python looks for a command (`python -m`), whose caller wants one sentence
        and no traceback: SystemExit 2 behind the sentence on stderr.
    """
    root = Path(__file__).resolve().parents[1]
    for name in names or SIBLINGS:
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a module without a spec was put there by hand
            continue
        places = [spec.origin] if spec and spec.origin else list(spec.submodule_search_locations or ()) if spec else []
        if not places or (root / name) in (Path(places[0]).resolve(), Path(places[0]).resolve().parent):
            continue
        error = ShadowedError(
            f"{places[0]} hides jaxattn's package {name!r}: rename it, or start Python in another folder."
        )
        if sys.argv[:1] == ["-m"]:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        raise error
