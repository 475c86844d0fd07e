"""Looks: what a file seems to be, from its first bytes, and what to do with it."""

from __future__ import annotations

PACK = "Pack it with: tersor pack FILE -o OUT.tersor"
SAVE = "Save its state dict as safetensors, then pack that: tersor pack WEIGHTS -o OUT.tersor"

# First bytes, what it looks like, the way out.
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
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "Fetch it: git lfs pull"),
)


def sniff(head: bytes) -> str:
    """What is said of a file that is not safetensors."""
    if not head:
        return "it is empty"
    what, way_out = f"it begins with the bytes {head[:8].hex(' ')}", ""
    for start, kind, way in KINDS:
        if head.startswith(start):
            what, way_out = f"it looks like {kind}", f". {way}"
    # An ONNX model begins with field 1, its ir_version, a small number; field 2, a text, is the producer.
    if head[:1] == b"\x08" and 1 <= int.from_bytes(head[1:2]) <= 20 and head[2:3] in (b"\x12", b":", b"B"):
        what, way_out = "it looks like an ONNX model", f". {SAVE}"
    return f"it is not a .tersor or .safetensors file: {what}{way_out}"
