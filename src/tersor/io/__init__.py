"""Read, write, check, pack, unpack, compare and patch .tersor files and checkpoints.

Import from the modules: what is read needs no recipe, so `show` and `verify` load neither steps nor graphs.
"""
