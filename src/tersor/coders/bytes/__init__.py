"""Bytes: order-0 coders with a whole number of bits for each symbol, and byte planes.

A symbol is one byte. `plain.py` stores it in 1 to 8 bits, or a constant once. `huffman.py` is Huffman coding.
`planes.py` splits elements of several bytes into planes: plane k is byte k of every element.
"""
