"""Patches: what makes a later file of weights of an earlier one. docs/format.md section 12.

`diff.py` writes a patch and `patch.py` applies it. Both see a file as named arrays (`named_arrays.py`).
`residual.py` codes an array as its difference from an earlier one; `patch_reader.py` reads a patch and makes
the new arrays.
"""
