"""Bytes: coders of single symbols that need no frequencies, and the symbols themselves.

A symbol is one byte. `plain.py` stores it in 1 to 8 bits, or a constant once; `huffman.py` gives each symbol
a whole number of bits. `planes.py` turns elements of several bytes into planes: byte k of every element.
"""
