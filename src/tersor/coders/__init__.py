"""Coders: integers to bytes and back, exactly.

choice.py     the door: `encode` tries coders and keeps the fewest bytes, `decode` reads any of their streams
bytes/        coders of single symbols with whole bits (raw, constant, Huffman); elements as planes of bytes
rans/         rANS: near the entropy of single symbols, with its frequency table
predictive/   rANS for a dense matrix: each code predicted from its row, its column and the codes before it
mixing/       context mixing for a sparse matrix and for masks
pieces.py     a long stream cut into pieces, each coded on a core of its own
arrays.py     arrays of any element size, a plane of bytes at a time

A stream names its coder in its first byte and stores neither its length nor its count: docs/streams.md.
"""

from tersor.coders.choice import (
    CODERS,
    MATRIX_CODERS,
    PROFILES,
    coder_of,
    decode,
    encode,
    order0_bits,
)

__all__ = ["CODERS", "MATRIX_CODERS", "PROFILES", "coder_of", "decode", "encode", "order0_bits"]
