"""Patches: the differences between an earlier and a later file of weights. docs/format.md section 12.

`diff.py` writes a patch, `patch.py` applies it. Both read a file as named arrays (`named_arrays.py`).
`residual.py` codes an array as its difference from an earlier one. `patch_reader.py` reads a patch and
decodes the new arrays.
"""
