"""Channels: which indices of which tensors belong together, how they are cut, and the proof of a cut.

atoms      labels of indices, and what operators say about them
rules      one rule for each operator            reshape   merging and splitting dimensions
solver     atoms -> components and their fate     groups    components -> families of units
run_graph  the traced graph with units cut, or masked: the reference
integers   which integers of a module's code follow its widths
module     the user's own module with units cut, compared with the reference edge by edge
"""
