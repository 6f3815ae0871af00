"""The command line of everything that trains: flags -> `RunConfig`, and one sentence for what cannot be one."""

from __future__ import annotations

import contextlib
import io

import tyro

from jaxattn.errors import ConfigError
from jaxattn.runs.config import RunConfig
from train.config_flags import flags_of, refuse_unknown

READ_EARLIER = ("--help", "--list-attn", "--list-presets")  # of all commands that train
FLAG_ALIASES = {"--data": "--data.source", "--backend": "--model.backend"}

DESCRIPTION = """Pretrain a decoder with swappable attention and watch attention sinks emerge.

--list-attn names every attention, --list-presets every recipe; --data=X is short for --data.source=X,
--backend=X for --model.backend=X."""


def parse_args(
    args: list[str],
    default: RunConfig,
    prog: str = "python -m train.pretrain",
    description: str = DESCRIPTION,
    others: tuple[str, ...] = (),
) -> RunConfig:
    """Command line -> RunConfig over the given defaults; prints help and exits 0 on --help.

    Args:
      others: flags that the command reads before these, as near names of what is mistyped.

    Raises:
      ConfigError: a flag that does not exist, or a value it cannot have.
    """
    expanded = []
    for arg in args:
        flag, eq, value = arg.partition("=")
        if flag == "--model.mixers":
            raise ConfigError("--model.mixers is set by --attn: write the pattern there, e.g. --attn='softmax, none'.")
        if flag == "--model.policy":
            raise ConfigError(
                "--model.policy is of a trained model that decodes: train without it, and give --policy to "
                "jaxattn.generate or an eval."
            )
        expanded.append(FLAG_ALIASES.get(flag, flag) + eq + value)
    refuse_unknown(expanded, [*flags_of(RunConfig), *FLAG_ALIASES, *READ_EARLIER, *others])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(RunConfig, args=expanded, default=default, prog=prog, description=description)
    except SystemExit as ended:
        if not ended.code:  # --help
            raise
        raise ConfigError(_sentence(said.getvalue(), prog)) from None


def _sentence(box: str, prog: str) -> str:
    """What tyro says in a box, without the box and its long list of flags."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    complaint = " ".join(lines[:rule] or box.split()).rstrip(".")
    return f"{complaint}; see {prog} --help."
