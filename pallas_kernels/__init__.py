"""Hot-path operations, one folder per op: a slow f32 reference and one file per backend.

Callers name an op and, if they must, a backend; nothing outside this package knows which exist.
`python -m pallas_kernels` prints what each op's backends can do.

Kernels for GPUs multiply bfloat16 and refuse float32, which "auto" leaves to "xla". Who wants it rounded says so to
JAX, for all products of a program: `jax.default_matmul_precision("BF16_BF16_F32")`, or the environment variable
`JAX_DEFAULT_MATMUL_PRECISION`. A decoding cache is never rounded.
"""

import jaxattn.signals  # noqa: F401 - with its package, which takes a command's signals before JAX is imported
from pallas_kernels._dispatch import may_be_kernel, recording
from pallas_kernels._interpret import compiling_for, interpreted
from pallas_kernels.flash import Score, flash, merge

__all__ = ["Score", "compiling_for", "flash", "interpreted", "may_be_kernel", "merge", "recording", "support"]


def support() -> list:
    """What each op's backends serve: entries with op, feature, backend and, where refused, the reason."""
    from pallas_kernels._support import support  # it imports every op

    return support()
