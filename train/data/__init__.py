"""Data: one configuration, one source, batches that resume exactly.

    from train.data import DataConfig, make_source

    source = make_source(DataConfig(source="bb", context=64), seed=0)
    batches = source.train_iterator()      # a Grain iterator: get_state / set_state / next
    batch = next(batches)                  # {"tokens": [b, T], "targets": [b, T], ...} NumPy

Importing this package imports neither JAX nor Grain; `train_iterator` and `val_batches` do.
"""

from jaxattn.runs.data_config import DataConfig
from train.data.open import make_source
from train.data.source import Source

__all__ = ["DataConfig", "Source", "make_source"]
