"""rANS: symbols at the cost of their frequencies, a fraction of a bit above the entropy (Duda 2013).

`table_plan.py` plans the frequency table that makes table and payload shortest (encoder only), `tables.py`
writes and reads it, `rans.py` is the coder. Long streams have 16 or 32 states side by side: `wide_loops.py`,
and in `cpu_loops.py` the two processor instructions that help it.
"""
