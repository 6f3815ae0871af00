"""Run folders and converted checkpoints: what is written there, and how it is opened to be read.

open_trained(folder)   the model and its parameters, with the attention it was trained with or with other options
read_config(folder)    its `RunConfig`
"""

from jaxattn.runs.load import load_params, read_config
from jaxattn.runs.opened import Trained, open_trained

__all__ = ["Trained", "load_params", "open_trained", "read_config"]
