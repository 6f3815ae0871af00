"""jaxattn: attention research in JAX.

`attend(name, q, k, v, ...)` runs any mechanism on arrays; `mechanisms` lists, documents and registers them;
`generate(model, params, tokens, ...)` continues prompts; `decoding_variables(model, params)` prepares params once
for many calls of it. They load on first use, so that tools which only read files need not start JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxattn import signals
from jaxattn.siblings import refuse_shadows

if TYPE_CHECKING:
    from jaxattn import mechanisms
    from jaxattn._attend import attend
    from jaxattn._generate import generate
    from jaxattn.nn.decoding import decoding_variables

signals.install_for_command()
refuse_shadows("pallas_kernels")

__version__ = "0.1.0"
__all__ = ["__version__", "attend", "decoding_variables", "generate", "mechanisms"]


def __getattr__(name: str) -> Any:
    if name == "attend":
        from jaxattn._attend import attend

        return attend
    if name == "generate":
        from jaxattn._generate import generate

        return generate
    if name == "decoding_variables":
        from jaxattn.nn.decoding import decoding_variables

        return decoding_variables
    if name == "mechanisms":
        return importlib.import_module("jaxattn.mechanisms")
    raise AttributeError(f"module 'jaxattn' has no attribute {name!r}")
