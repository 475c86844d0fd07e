"""The encoding side of forms, which can only decode: store weights again, and code leaves as streams."""

from tersor.encode.leaves import coded, recoded, shortened
from tersor.encode.refine import Store, refine

__all__ = ["Store", "coded", "recoded", "refine", "shortened"]
