"""From the text of `data.source` to its documents."""

from __future__ import annotations

from train.data.corpus import Corpus


def open_corpus(source: str, text_field: str = "text") -> Corpus:
    """Finds the documents of `source` (see `DataConfig.source`).

    Raises:
      DataError: nothing is there, or the needed package is missing.
    """
    if source == "stdlib" or source.startswith("stdlib:"):
        from train.data.stdlib import stdlib_corpus

        return stdlib_corpus(source)
    if source.startswith("hf:"):
        from train.data.hub import hub_corpus

        return hub_corpus(source, text_field)
    from train.data.files import file_corpus

    return file_corpus(source, text_field)
