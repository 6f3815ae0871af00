"""Hot-path operations, one folder per op: a slow f32 reference and one file per backend.

Callers name an op and, if they must, a backend; nothing outside this package knows which exist.
"""

from pallas_kernels.flash import Score, flash

__all__ = ["Score", "flash"]
