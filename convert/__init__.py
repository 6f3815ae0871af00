"""HuggingFace checkpoints in and out, GGUF in: one rule table for both directions.

    python -m convert.from_hf SRC DST     HuggingFace folder, GGUF file or hub name -> jaxattn checkpoint
    python -m convert.to_hf SRC DST       jaxattn checkpoint -> HuggingFace folder
    python -m convert.verify SRC DST      logits of both compared on real prompts

Nothing in a checkpoint is ever executed: no pickle, no remote code, JSON and safetensors only.
"""

from jaxattn import signals

signals.install_for_command()
