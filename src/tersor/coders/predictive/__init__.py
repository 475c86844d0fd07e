"""Predictive: rANS for dense matrices of codes, each code predicted before it is coded.

`matrix_model.py` states the model in whole numbers: a spread for each row and column, and a linear prediction
of each column from the earlier ones. `regression_loops.py` learns the prediction from the rows so far,
`predictive_loops.py` applies it, `scale_tables.py` plans one frequency table for each spread, and
`predictive.py` writes and reads the stream.
"""
