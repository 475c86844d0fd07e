"""Coders: lossless entropy coders for integers.

choice.py     the entry point: `encode` tries coders and keeps the shortest stream, `decode` reads any stream
bytes/        order-0 coders with whole bits for each symbol (raw, constant, Huffman); byte planes
rans/         rANS: close to the order-0 entropy, with a stored frequency table
predictive/   rANS for a dense matrix: each code is predicted from its row, its column and earlier codes
mixing/       context mixing for sparse matrices and masks
pieces.py     a long stream cut into pieces, which are coded and decoded in parallel
arrays.py     arrays of any element size, one stream for each byte plane

The first byte of a stream names its coder. A stream does not store its length or its count: docs/streams.md.
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
