"""Integers peer: an int8 file of a float .onnx file by another library, in an interpreter that has it.

PYTHON bench/integers_peer.py METHOD FLOAT.onnx IMAGES.npy FOLDER         images: [N, C, H, W] float32
METHOD
    ort-minmax, ort-percentile   quantize_static after quant_pre_process: QDQ, uint8 activations, int8 weights
                                 with a scale for each channel
    ort-tensor                   min-max, weights with one scale a tensor
    nncf-onnx-*, nncf-openvino-* NNCF on the file, or on OpenVINO's model of it; * is the preset: mixed
                                 (asymmetric activations) or performance (symmetric)
All images calibrate, one at a time. The last line is JSON (`Made`). bench/integers.py runs it. It needs
numpy, onnx, onnxruntime, openvino, nncf.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if str(HERE.parent / "src") not in sys.path:
    sys.path.append(str(HERE.parent / "src"))  # child.py needs tersor's errors, nothing else

from child import NOT_INSTALLED, answer, peak  # noqa: E402

Quantizer = Callable[[Path, np.ndarray, Path], Path]  # (float file, images, file without suffix) -> file


@dataclass(frozen=True)
class Made:
    """A file that was made in a process of its own."""

    method: str
    path: str
    nbytes: int
    seconds: float  # of processor time
    memory: float  # MB that calibrating, quantizing and writing added to the process's peak
    bare: int = 0  # bytes without what the exporter noted about nodes, which is not needed; .onnx only
    simulated: str = ""  # file: what PyTorch answers for the test images, [N, classes]; ours only


def made(method: str, path: Path, began: float, before: float) -> Made:
    """What was measured, now that it is done: `began` is processor time, `before` the peak until then."""
    seconds, memory = time.process_time() - began, peak() - before
    return Made(method, str(path), nbytes(path), seconds, memory, bare(path))


def nbytes(path: Path) -> int:
    """Bytes of a model; OpenVINO's has its weights in a second file."""
    return sum(item.stat().st_size for item in (path, path.with_suffix(".bin")) if item.exists())


def bare(path: Path) -> int:
    """Bytes of an .onnx file without stack traces and the like, which PyTorch's exporter writes; else 0."""
    if path.suffix != ".onnx" or not path.exists():
        return 0
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    for item in (
        model,
        graph,
        *graph.node,
        *graph.value_info,
        *graph.input,
        *graph.output,
        *graph.initializer,
    ):
        del item.metadata_props[:]
    return int(model.ByteSize())


def onnx_runtime(
    given: Path, images: np.ndarray, out: Path, *, calibrate: str, per_channel: bool = True
) -> Path:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = input_of(given)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.at = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.at += 1
            return {name: images[self.at - 1 : self.at]} if self.at <= len(images) else None

        def set_range(self, start_index: int, end_index: int) -> None:
            self.at = start_index

        def __len__(self) -> int:
            return len(images)

    path = out.with_suffix(".onnx")
    with tempfile.TemporaryDirectory() as folder:
        folded = Path(folder) / "folded.onnx"
        quant_pre_process(str(given), str(folded))
        quantization.quantize_static(
            str(folded),
            str(path),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=quantization.QuantType.QUInt8,  # int8, the default, is slower than float
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[calibrate],
        )
    return path


def nncf_onnx(given: Path, images: np.ndarray, out: Path, *, preset: str) -> Path:
    import onnx

    name = input_of(given)
    result = nncf(onnx.load(str(given)), [{name: image[None]} for image in images], preset)
    path = out.with_suffix(".onnx")
    onnx.save(result, str(path))
    return path


def nncf_openvino(given: Path, images: np.ndarray, out: Path, *, preset: str) -> Path:
    import openvino

    result = nncf(openvino.Core().read_model(str(given)), [image[None] for image in images], preset)
    path = out.with_suffix(".xml")
    openvino.save_model(result, str(path))
    return path


def input_of(path: Path) -> str:
    """The name of the only input."""
    import onnx

    (found,) = onnx.load(str(path), load_external_data=False).graph.input
    return str(found.name)


def nncf(model: Any, inputs: list[Any], preset: str) -> Any:
    import nncf

    return nncf.quantize(
        model, nncf.Dataset(inputs), preset=nncf.QuantizationPreset(preset), subset_size=len(inputs)
    )


# What is imported before time and memory are taken, and the quantizer.
ORT, NNCF = ("onnx", "onnxruntime.quantization"), ("onnx", "openvino", "nncf")
METHODS: dict[str, tuple[tuple[str, ...], Quantizer]] = {
    "ort-minmax": (ORT, partial(onnx_runtime, calibrate="MinMax")),
    "ort-percentile": (ORT, partial(onnx_runtime, calibrate="Percentile")),
    "ort-tensor": (ORT, partial(onnx_runtime, calibrate="MinMax", per_channel=False)),
    "nncf-onnx-mixed": (NNCF, partial(nncf_onnx, preset="mixed")),
    "nncf-onnx-performance": (NNCF, partial(nncf_onnx, preset="performance")),
    "nncf-openvino-mixed": (NNCF, partial(nncf_openvino, preset="mixed")),
    "nncf-openvino-performance": (NNCF, partial(nncf_openvino, preset="performance")),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("given", type=Path, help="a float .onnx file")
    parser.add_argument("images", type=Path, help="images to calibrate with, .npy")
    parser.add_argument("out", type=Path, help="folder of the new file")
    options = parser.parse_args(argv)
    lines = answer()
    packages, quantize = METHODS[options.method]
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        print(f"{options.method}: not installed: {error}", file=sys.stderr)
        return NOT_INSTALLED
    images = np.load(options.images)
    options.out.mkdir(parents=True, exist_ok=True)
    began, before = time.process_time(), peak()
    path = quantize(options.given, images, options.out / options.method)
    lines.write(json.dumps(asdict(made(options.method, path, began, before))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
