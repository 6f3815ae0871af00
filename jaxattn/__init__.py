"""jaxattn: attention research in JAX.

`attend(name, q, k, v, ...)` runs any parameter-free mechanism; `mechanisms` lists and documents them.
"""

from jaxattn import mechanisms
from jaxattn.attend import attend

__version__ = "0.1.0"
__all__ = ["__version__", "attend", "mechanisms"]
