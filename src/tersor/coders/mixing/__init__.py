"""Mixing: binary arithmetic coding with mixed contexts (Mahoney 2005), for sparse matrices and masks.

`mixing_loops.py` splits a code into bits and finds their contexts, `row_predictor_loops.py` predicts from
similar rows above, `arithmetic_loops.py` mixes the predictions and codes the bit, `logistic.py` holds the
tables of the logistic function and of the learning rates. `mixing.py` writes and reads the stream.
"""
