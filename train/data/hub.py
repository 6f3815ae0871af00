"""HuggingFace datasets as a corpus (extra `hf`); a local dataset folder works without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator

from jaxattn.errors import DataError
from train.data.cache_files import digest
from train.data.corpus import Corpus, Tally


def hub_corpus(source: str, text_field: str = "text") -> Corpus:
    """The rows of "hf:NAME[:SPLIT]" (split "train" unless given); NAME may be a folder such as ./my_dataset.

    Raises:
      DataError: `datasets` is not installed, the data set or split is not found, or has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.source={source!r} needs the package `datasets`: run pip install 'jaxattn[hf]'."
        ) from error
    name, _, split = source.removeprefix("hf:").partition(":")
    split = split or "train"
    try:
        data = _load(datasets, os.path.expanduser(name), split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"data.source={source!r} cannot be loaded ({reason}): check the name, the split {split!r} and the network."
        ) from error
    if text_field not in data.column_names:
        raise DataError(
            f"data.source={source!r} has no column {text_field!r}: set --data.text-field to one of "
            f"{', '.join(data.column_names)}."
        )
    data = data.select_columns([text_field])

    def read(tally: Tally) -> Iterator[str]:
        for row, record in enumerate(data):
            text = record[text_field]
            if isinstance(text, str):
                yield text
            else:
                tally.bad(f"row {row} of {source!r}", f"column {text_field!r} is a {type(text).__name__}")

    return Corpus(
        name=source,
        # The library's fingerprint follows the content of the data and every operation on it.
        fingerprint=digest("hf", str(data._fingerprint), text_field),
        size=int(data.size_in_bytes or data.data.nbytes),
        files=1,
        read=read,
    )


def _load(datasets, name: str, split: str):
    saved = ("state.json", "dataset_dict.json")
    if os.path.isdir(name) and any(os.path.exists(os.path.join(name, f)) for f in saved):
        data = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict):
            return data[split]
        if split != "train":
            raise ValueError("the folder holds one data set without splits")
        return data
    return datasets.load_dataset(name, split=split)
