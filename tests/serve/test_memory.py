"""Which memory a server may give back."""

from __future__ import annotations

import pytest

from jaxattn.serving.memory import unchanged

HEAD = "7f0000000000-7f0000004000 {} 00000000 fe:00 1234                       {}"
FACTS = {"Size": 16, "Rss": 16, "Shared_Clean": 0, "Private_Clean": 16, "Private_Dirty": 0, "Anonymous": 0, "Swap": 0}


def smaps(permissions="r-xp", file="/usr/lib/libm.so.6", **facts):
    lines = [HEAD.format(permissions, file), *(f"{k}:  {v:10} kB" for k, v in (FACTS | facts).items())]
    return "\n".join([*lines, "VmFlags: rd ex mr mw me", "7f0000005000-7f0000006000 rw-p 0 0:0 0", "Size: 4 kB", ""])


@pytest.mark.parametrize("permissions", ["r-xp", "r--p"])
def test_a_program_file_as_it_is_on_the_disk(permissions):
    assert unchanged(smaps(permissions)) == [(0x7F0000000000, 0x7F0000004000)]


@pytest.mark.parametrize(
    "other",
    [{"Anonymous": 4}, {"Private_Dirty": 8}, {"Swap": 12}, {"permissions": "rw-p"}, {"permissions": "r--s"},
     {"file": ""}, {"file": "[vdso]"}],
    ids=str,
)  # fmt: skip
def test_what_could_not_be_read_again_stays(other):
    assert unchanged(smaps(**other)) == []
