"""Tables page: docs/tables.md, written from bench/comparisons.jsonl and zoo/measured.jsonl.

python bench/tables_page.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path

import comparison_tables as tables
import misconceptions
import zoo_table
from comparison_rows import TABLES
from page import command, table
from rows_file import COMPARISON_ROWS, ZOO_ROWS, Row, read

from tersor.files import write_text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tables.md"


def page(zoo: list[Row], compared: list[Row]) -> str:
    """docs/tables.md."""
    rows = {(row["net"], row["recipe"], row["seed"]): row for row in compared}
    parts = [HEAD]
    for letter, about in SECTIONS.items():
        parts.append(f"\n## ({letter}) {about}\n\n{SPECIAL.get(letter, usual)(letter, rows)}")
    machines = sorted({row["machine"].partition(", load")[0] for row in compared})
    parts.append(f"\n(a) to (g) and (i) were measured on: {'; '.join(machines) or tables.NONE}.\n")
    parts.append(zoo_table.text(zoo))
    parts.append(MISTAKES + misconceptions.text(rows))
    return "".join(parts)


def usual(letter: str, rows: tables.Rows) -> str:
    return tables.listed(TABLES[letter], rows, tables.COLUMNS[letter], tables.FIRST[letter])


def one_network(letter: str, rows: tables.Rows) -> str:
    first, columns = tables.FIRST[letter], tables.COLUMNS[letter]
    quality = table(
        (first, *columns, "recipe"),
        [
            tables.before(rows),
            *(tables.line(trial, rows.get(trial.key), columns) for trial in TABLES[letter]),
        ],
    )
    running = [tables.line(trial, rows.get(trial.key), tables.RUNNING)[:-1] for trial in TABLES[letter]]
    return f"{quality}\n{RUNNING}\n\n{table((first, *tables.RUNNING), running)}"


def with_equal(letter: str, rows: tables.Rows) -> str:
    if letter == "b":
        return f"{usual(letter, rows)}\n{EQUAL_ACCURACY}\n\n{tables.equal_accuracy(rows)}"
    return f"{EQUAL_BYTES}\n\n{tables.equal_bytes(rows)}\n{usual(letter, rows)}"


SPECIAL = {"a": one_network, "b": with_equal, "d": with_equal, "e": lambda _, rows: tables.students(rows)}


def written() -> str:
    return page(read(ZOO_ROWS), read(COMPARISON_ROWS))


def write() -> None:
    write_text(PAGE, written())


HEAD = """# Tables

Techniques side by side, and every architecture of [the zoo](guide.md#the-zoo) before and after. `make tables`
measures them and writes this page: `bench/comparisons.py` (a) to (g) and (i), from `bench/comparisons.jsonl`;
`bench/tables.py` (h), from `src/tersor/zoo/measured.jsonl`.

(a) to (g) and (i) are of networks trained on Fashion-MNIST, LeNet-5 if no other is named. A row is a recipe:

    tersor run bench/networks.py:LeNet5 --weights lenet5.safetensors --task fashion-mnist:FOLDER \\
        --out out RECIPE

* **accuracy**: of the weights read back from the file, on all 10,000 test images, with its 95 % interval.
  **drop**: against the given network, paired by image; below 0 is a gain.
* **bytes**: of the file with its ledger, and its share of the given safetensors file. `entropy`, the last
  word of each recipe, is lossless.
* **weights left**: parameters that are not zero, in the network as it runs. **MACs left**: by torch's
  counter, which counts products with zeros too.
* **times as fast**: exported files of both networks take turns in one process, batch 1, one thread, as
  `tersor compare --latency` does; the median of the rounds' ratios. "noisy": the given network against
  itself was not 1 within its interval.
* **training**: seconds of processor time of the recipe, calibration included, without coding and measuring.
* Where nothing is measured, the row says why; a text in place of figures is Tersor's own refusal. "quick"
  rows had 2 % of the epochs and 1,000 test images, and say only that everything runs.
"""
SECTIONS = {
    "a": """One network: each technique alone, all together

The student is LeNet-5 with half the channels and neurons, untrained at first; its drop is against the whole
LeNet-5, its teacher.""",
    "b": """What goes: weights, channels, filters, N:M, blocks

At equal parameters: the same share of the weights is left. A pruned weight is a zero in a network of the old
size, a channel is gone from it.""",
    "c": """Bits

One scale for each output channel, all layers. 1 bit is `scheme=binary`. The row of 32 trained bits shows what
the training alone gives.""",
    "d": """Linear, logarithmic and shared levels

One set of levels for each tensor; nothing is trained.""",
    "e": """What a teacher gives, by the student's size

The same first weights (`torch.manual_seed(seed)`), epochs and order of batches, alone and taught by the whole
LeNet-5. The gain is paired by seed, with Student's interval. The names give channels and neurons:
`LeNet5(4, 10, 50)`. One epoch is short; a student of 20 epochs, with learning rates chosen for each of the
two, is in the [bench](../bench/README.md); so are students of the zoo beside teachers of other architectures,
which train for the same seconds, the teacher's included.""",
    "f": """Criteria

Those of `prune` at equal weights, those of `slim` at equal MACs. The task has 300 calibration images, fewer
than the 800 and 500 inputs of LeNet-5's linear layers: what `redundancy` and the refit after each cut solve
is damped there, by the number of images.""",
    "g": """Products

SVD, Tucker-2, CP, spatial factors and tensor trains, each factor a layer of its own.""",
}
RUNNING = """Running: the given network, then that of the recipe; one image, one thread. Memory: the growth
of the process while ONNX Runtime opens and runs the file, at its peak. Processor seconds: in ONNX Runtime;
other load changes them less than milliseconds."""
EQUAL_ACCURACY = f"""At equal accuracy: the fewest weights of the tuned rows above whose drop is at most
{tables.EQUAL:g} point, by the upper end of its interval:"""
EQUAL_BYTES = f"""At equal bytes: each file with linear levels, and of each other kind the least drop, in
points, in at most {100 * (tables.NEAR - 1):.0f} % more bytes:"""
MISTAKES = """
## (i) What is often said

A claim is refuted if the 95 % interval of one of its rows excludes it; rows that are noisy settle nothing.

"""


def main(argv: list[str] | None = None) -> int:
    return command(argv, __doc__ or "", PAGE, written)


if __name__ == "__main__":
    sys.exit(main())
