"""Where this library keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$JAXATTN_CACHE, else ~/.cache/jaxattn; it may not be there yet."""
    return Path(os.environ.get("JAXATTN_CACHE") or "~/.cache/jaxattn").expanduser()
