"""Channels: which indices of which tensors belong together, how they are cut, and the proof of a cut.

atoms        labels of indices, and what operators say about them
rules        the table of operators: layer_rules, shape_rules, reshape
walk         one pass over a traced graph
solver       atoms -> components and their fate         groups       components -> families of units
run_graph    the graph with units cut, or masked        counted_run  the same as a model, for proofs
integers     which integers of a module's code follow its widths
own_module   the user's module with units cut, compared with the graph edge by edge
costs        what units cost                            reconstruct  refitting what reads fewer units
"""
