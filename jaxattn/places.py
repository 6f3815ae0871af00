"""Where this library keeps what it can make or fetch again, and what a checkpoint's folder calls its parts."""

from __future__ import annotations

import os
from pathlib import Path

SIDE = "hf"  # where a converted checkpoint keeps its source's own files


def cache_folder() -> Path:
    """$JAXATTN_CACHE, else ~/.cache/jaxattn; it may not be there yet."""
    return Path(os.environ.get("JAXATTN_CACHE") or "~/.cache/jaxattn").expanduser()
