"""Read, write, check, pack, unpack, compare and patch .tersor files and checkpoints."""

from tersor.io.container import TersorFile, load, read_tensor
from tersor.io.container_writer import save
from tersor.io.other_network import other_network
from tersor.io.pack import Packed, pack
from tersor.io.patch.diff import Delta, diff
from tersor.io.patch.patch import patch
from tersor.io.unpack import unpack
from tersor.io.verify import Check, verify

__all__ = [
    "Check", "Delta", "Packed", "TersorFile", "diff", "load", "other_network", "pack", "patch", "read_tensor",
    "save", "unpack", "verify",
]  # fmt: skip
