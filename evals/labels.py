"""Names short enough for a figure: what all of them have in common goes first, and different names stay different."""

from __future__ import annotations

import re
from collections.abc import Sequence

PIECES = ((r"[\w.]+|.", 4), (r"[^\W_]+|.", 4), (r".", 10))  # ever smaller ones, and how much is worth a "…"
CUT = "\0"  # a piece that stands for what was left out

Pieces = list[str]


def tell_apart(names: Sequence[str], limit: int) -> list[str]:
    """Each name in at most `limit` characters, whole where all fit; equal only where the names are equal."""
    if all(len(name) <= limit for name in names):
        return list(names)
    distinct = list(dict.fromkeys(names))
    by_name = dict(zip(distinct, _shortened(distinct, limit), strict=True))
    for shown in list(by_name.values()):
        alike = [name for name in distinct if by_name[name] == shown]
        if len(alike) > 1:  # cut where they differ: cut what these few have in common instead
            again = _shortened(alike, limit)
            if len(set(again)) < len(alike) or set(again) & (set(by_name.values()) - {shown}):
                again = [f"{middle(name, limit - 4)} #{distinct.index(name) + 1}" for name in alike]
            by_name |= zip(alike, again, strict=True)
    return [by_name[name] for name in names]


def middle(name: str, limit: int) -> str:
    """The name without its middle, where it is longer than `limit`."""
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return name[: limit - 1 - tail] + "…" + name[len(name) - tail :]


def _shortened(names: list[str], limit: int) -> list[str]:
    """Each in at most `limit` characters, without what all have in common; some may end up alike."""
    best = names
    if len(names) == 1 or max(map(len, names)) <= limit:
        return [middle(name, limit) for name in names]
    for piece, least in PIECES:
        pieces, left_out = [re.findall(piece, name) for name in names], []
        while _longest(pieces) > limit and (shared := _shared(pieces, least)):
            pieces = [_replaced(p, shared, [f"{CUT}{len(left_out)}"]) for p in pieces]
            left_out.append(shared)
        best = _joined(pieces, left_out, limit - _longest(pieces))
        if max(map(len, best)) <= limit:
            return best
    return [middle(name, limit) for name in best]


def _longest(pieces: Sequence[Pieces]) -> int:
    return max(sum(1 if piece[0] == CUT else len(piece) for piece in p) for p in pieces)


def _joined(pieces: Sequence[Pieces], left_out: Sequence[Pieces], room: int) -> list[str]:
    """Names again; the first part that was left out gets back as much of its beginning as there is room for."""
    first = min((p.index(piece), piece) for p in pieces for piece in p if piece[0] == CUT)[1] if left_out else ""
    shown = {f"{CUT}{i}": "…" for i in range(len(left_out))}
    if first:
        kept = ""
        for piece in left_out[int(first[1:])]:
            if len(kept) + len(piece) > room:
                break
            kept += piece
        shown[first] = kept + "…"
    return ["".join(shown.get(piece, piece) for piece in p) for p in pieces]


def _shared(pieces: Sequence[Pieces], least: int) -> Pieces:
    """The longest run of pieces in all names that can be left out; [] if none is worth it.

    Its last word stays where more follows in some name: "seed 1" says more than "1".
    """
    first = min(pieces, key=len)
    found: Pieces = []
    for start in range(len(first)):
        for stop in range(len(first), start, -1):
            if len("".join(first[start:stop])) <= max(len("".join(found)), least):
                break
            part = first[start:stop]
            if any(piece[0] == CUT for piece in part) or any(_find(p, part) < 0 for p in pieces):
                continue
            if any(_find(p, part) + len(part) < len(p) for p in pieces):
                part = _before_last_word(part)
            if len("".join(part)) > max(len("".join(found)), least) and all(len(p) > len(part) for p in pieces):
                found = part
            break
    return found


def _before_last_word(part: Pieces) -> Pieces:
    stop = len(part)
    while stop and not part[stop - 1][0].isalnum():
        stop -= 1
    return part[: max(stop - 1, 0)]


def _find(pieces: Pieces, part: Pieces) -> int:
    return next((i for i in range(len(pieces) - len(part) + 1) if pieces[i : i + len(part)] == part), -1)


def _replaced(pieces: Pieces, part: Pieces, by: Pieces) -> Pieces:
    at = _find(pieces, part)
    return [*pieces[:at], *by, *pieces[at + len(part) :]]
