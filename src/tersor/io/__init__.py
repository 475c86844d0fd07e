"""The .tersor file, checkpoints larger than memory, and the way between them."""

from tersor.io.container import TersorFile, load, read_tensor, save

__all__ = ["TersorFile", "load", "read_tensor", "save"]
