"""Training: one command, runs that resume to the bit, data that any process can make anew."""

import sys

try:
    from jaxattn.siblings import refuse_shadows
except ModuleNotFoundError as error:
    here = getattr(sys.modules.get("jaxattn"), "__file__", None) or "another folder of that name"
    raise ImportError(f"{here} hides the library jaxattn: rename it, or start Python in another folder.") from error

from jaxattn import signals

signals.install_for_command()
refuse_shadows()
