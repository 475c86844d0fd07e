"""rANS: entropy coding with a static frequency table, close to the order-0 entropy (Duda 2013).

`table_plan.py` chooses the frequency table that minimizes table plus payload (encoder only), `tables.py`
defines and reads it, `rans.py` is the coder. Long streams have 16 or 32 interleaved states, which
`wide_loops.py` decodes as vectors; `cpu_loops.py` has the two processor-specific operations of it.
"""
