"""Looking inside a model: capture, sink metric, extreme-token probes."""

from jaxattn.analysis.capture import AttentionView, ForwardView, look
from jaxattn.analysis.sink_rate import EPSILON, alpha_of, column_means, proxy_weights, sink_rate

__all__ = [
    "EPSILON",
    "AttentionView",
    "ForwardView",
    "alpha_of",
    "column_means",
    "look",
    "proxy_weights",
    "sink_rate",
]
