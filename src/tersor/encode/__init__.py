"""The encode side of forms, which only decode: weights stored anew, leaves as streams."""

from tersor.encode.leaves import coded, recoded, shortened
from tersor.encode.refine import Store, refine

__all__ = ["Store", "coded", "recoded", "refine", "shortened"]
