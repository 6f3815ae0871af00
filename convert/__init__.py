"""HuggingFace checkpoints in and out, GGUF in: one rule table for both directions.

    python -m convert.from_hf SRC DST     HuggingFace folder, GGUF file or hub name -> jaxattn checkpoint
    python -m convert.to_hf SRC DST       jaxattn checkpoint -> HuggingFace folder
    python -m convert.verify SRC DST      logits of both compared on real prompts

Nothing in a checkpoint is ever executed: no pickle, no remote code, JSON and safetensors only.
"""

import sys

try:
    from jaxattn.siblings import refuse_shadows
except ModuleNotFoundError as error:
    here = getattr(sys.modules.get("jaxattn"), "__file__", None) or "another folder of that name"
    raise ImportError(f"{here} hides the library jaxattn: rename it, or start Python in another folder.") from error

from jaxattn import signals

signals.install_for_command()
refuse_shadows()
