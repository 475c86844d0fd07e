"""Predictive: rANS for dense matrices of codes, with a predicted distribution for each code.

`matrix_model.py` defines the model in integers: a scale for each row and column, and a linear prediction of
each column from earlier columns. `regression_loops.py` fits the prediction to the rows so far,
`predictive_loops.py` applies it, `scale_tables.py` has one frequency table for each scale, and
`predictive.py` writes and reads the stream.
"""
