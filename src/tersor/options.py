"""Options: the arguments and options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = (
    "file.py:factory, package.module:factory, zoo:NAME, torchvision:NAME, hf:FOLDER, net.pt2, or FILE.tersor "
    "with --arch"
)
TASKS = "digits, fashion-mnist:FOLDER, scenes:KIND, zoo:NAME or file.py:function"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STEP KEY=VALUE ...]",
        help="a recipe in words: prune keep=0.1 entropy. tersor steps lists them",
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="a .tersor file")]
Weights = Annotated[
    str | None, typer.Option("--weights", metavar="FILE", help=".safetensors, or a saved state dict")
]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help="the network under this key, of a checkpoint with several"),
]
Arch = Annotated[
    str | None, typer.Option("--arch", metavar="FILE.py:NAME", help="the code of the model in FILE.tersor")
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="FILE", help="the original weights of FILE.tersor")
]
Folder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="folder of the results")]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="the short header, for files of a few kB: no ledger, one checksum")
]
Workers = Annotated[
    int | None, typer.Option("--workers", metavar="N", help="threads; default: one for each core")
]
Zeros = Annotated[
    str | None,
    typer.Option(
        "--zeros", metavar="GLOB", help="weights whose zeros stay zero; 'none': steps may change them"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
All = Annotated[bool, typer.Option("--all", help="every row of the tables, not only the largest")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on stderr")]
