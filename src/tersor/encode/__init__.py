"""The encoding side of forms, which can only decode: store weights again, and code leaves as streams."""

from tersor.encode.leaves import coded, coded_if_shorter, coded_like
from tersor.encode.refine import Store, refine

__all__ = ["Store", "coded", "coded_if_shorter", "coded_like", "refine"]
