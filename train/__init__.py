"""Training: one command, runs that resume to the bit, data that any process can make anew."""

from jaxattn import signals

signals.install_for_command()
