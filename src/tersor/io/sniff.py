"""Sniff: guess the type of a file from its first bytes, and suggest how to read it."""

from __future__ import annotations

PACK = "Pack it with: tersor pack FILE -o OUT.tersor"
SAVE = "Save its state dict as safetensors, then pack that: tersor pack WEIGHTS -o OUT.tersor"

# First bytes, type of file, what to do.
KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip file, such as a PyTorch checkpoint (.pt, .pth, .bin)", PACK),
    (b"\x80\x02", "a pickle, such as an old PyTorch checkpoint", PACK),
    (b"\x80\x03", "a pickle", SAVE),
    (b"\x80\x04", "a pickle", SAVE),
    (b"\x80\x05", "a pickle", SAVE),
    (b"TSR", "a .tersor file whose short header has another number", "A newer tersor may read it"),
    (b"GGUF", "a GGUF file", SAVE),
    (b"\x89HDF", "an HDF5 file, such as Keras weights", SAVE),
    (b"\x93NUMPY", "a numpy array", SAVE),
    (b"\x1f\x8b", "a gzip file", "Unpack it first: gunzip FILE"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "Unpack it first: zstd -d FILE"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch it: git lfs pull"),
)


def sniff(head: bytes) -> str:
    """The error message for a file that is not a safetensors file."""
    if not head:
        return "it is empty"
    what, advice = f"it begins with the bytes {head[:8].hex(' ')}", ""
    for start, kind, action in KINDS:
        if head.startswith(start):
            what, advice = f"it looks like {kind}", f". {action}"
    # An ONNX model begins with field 1, ir_version, a small number; field 2 is the producer's name.
    if head[:1] == b"\x08" and 1 <= int.from_bytes(head[1:2]) <= 20 and head[2:3] in (b"\x12", b":", b"B"):
        what, advice = "it looks like an ONNX model", f". {SAVE}"
    return f"it is not a .tersor or .safetensors file: {what}{advice}"
