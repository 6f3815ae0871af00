"""One prepared run on a GPU, numbers and speed of every op: `python -m scripts.bench.device`."""
