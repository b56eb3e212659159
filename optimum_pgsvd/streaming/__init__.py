"""Checkpoints larger than memory: read, compressed and written piece by piece."""

from .measure import measure_checkpoint
from .run import ACTIVATION_MEMORY, compress_checkpoint
from .source import StreamedModel
from .weights import StreamedWeights


__all__ = ["ACTIVATION_MEMORY", "StreamedModel", "StreamedWeights", "compress_checkpoint", "measure_checkpoint"]
