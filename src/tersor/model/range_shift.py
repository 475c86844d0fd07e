"""Range shift: edges whose values on one set of data lie elsewhere than on another.

overlap of two ranges = length of their intersection / length of their union

Calibration data unlike the training data (another normalization, another language) shifts most ranges; with
samples of the same data the ends move by some percent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tersor.maths.activation_ranges import Range

ENOUGH = 0.5  # overlap of ranges of the same data; that of 100 and of 100,000 normal values is about 0.6


def unlike(
    calibration: Mapping[str, Range], training: Mapping[str, Range], *, overlap: float = ENOUGH
) -> list[str]:
    """A sentence for each edge whose ranges overlap less than that, the least first; [] if all are alike.

    Ranges with several channels are compared by the mean over these.
    """
    found = []
    for name in calibration.keys() & training.keys():
        (low, high), (other_low, other_high) = calibration[name], training[name]
        both = torch.minimum(high, other_high) - torch.maximum(low, other_low)
        either = torch.maximum(high, other_high) - torch.minimum(low, other_low)
        shared = float(torch.where(either > 0, both / either, 1.0).mean())
        if shared < overlap:
            ends = [float(end) for end in (low.min(), high.max(), other_low.min(), other_high.max())]
            text = "{:.3g} to {:.3g} on calibration data and {:.3g} to {:.3g} on training data".format(*ends)
            found.append((shared, f"{name}: its values are {text}, an overlap of {shared:.0%}"))
    return [text for _, text in sorted(found)]
