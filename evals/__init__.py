"""Measurements of trained runs, and the report."""

from jaxattn import signals

signals.install_for_command()
