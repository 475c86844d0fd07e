"""Mixing: binary arithmetic coding with context mixing (Mahoney 2005), for sparse matrices and masks.

`mixing_loops.py` splits a code into bits and computes their contexts. `row_predictor_loops.py` predicts a
code from earlier rows. `arithmetic_loops.py` mixes the probabilities and codes the bit. `logistic.py` has
tables of the logistic function and of learning rates. `mixing.py` writes and reads the stream.
"""
