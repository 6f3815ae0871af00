"""Studies, benchmarks and tables of this repository."""

from jaxattn import signals

signals.install_for_command()
