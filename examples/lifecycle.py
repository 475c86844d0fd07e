"""Compression over a model's life, in half a minute: run it in this folder, python lifecycle.py.

Each line is a file that was written, with its bytes and the accuracy of what is read back from it. The last
two are patches: what a device that has the file before it must receive.
"""

import time
from dataclasses import replace
from pathlib import Path

from mine import net, spirals, task
from torch import nn

import tersor

OUT = Path("out/life")
DATA = replace(task(), calibrate=task().train)
STORE = [tersor.Quantize(bits=6), tersor.Entropy()]


def told(stage: str, nbytes: int, module: nn.Module, note: str = "") -> None:
    print(f"{stage:<42} {nbytes:>7,} bytes {100 * DATA.scores(module).mean():>7.2f} %  {note}".rstrip())


def saved(stage: str, state: tersor.State, began: float) -> tersor.State:
    path = OUT / f"{stage.replace(' ', '_').replace(':', '')}.tersor"
    nbytes = tersor.save(state, path)
    told(stage, nbytes, tersor.load(path).model(net()), f"{time.perf_counter() - began:.1f} s")
    return state


def shipped(stage: str, old: tersor.State, new: tersor.State) -> tersor.State:
    """A patch from one state's file to the next one's; the device makes the new file from it."""
    files = OUT / "old.tersor", OUT / "new.tersor", OUT / "p.patch", OUT / "device.tersor"
    tersor.save(old, files[0])
    whole = tersor.save(new, files[1])
    nbytes = tersor.diff(files[0], files[1], files[2]).nbytes
    tersor.patch(files[0], files[2], files[3])
    assert files[3].read_bytes() == files[1].read_bytes()
    told(stage, nbytes, tersor.load(files[3]).model(net()), f"a patch; the file has {whole:,} bytes")
    return new


OUT.mkdir(parents=True, exist_ok=True)
model = net()
told("given", sum(4 * p.numel() for p in model.parameters()), model)

now = time.perf_counter()
saved("after training: no data", tersor.run(model, [tersor.Rdoq(bits=4), tersor.Entropy()]), now)

now = time.perf_counter()
slim = tersor.Slim(keep=0.3, of="parameters")
saved("after training: no labels", tersor.run(model, [slim, *STORE], DATA), now)

now = time.perf_counter()
slim = tersor.Slim(keep=0.6, of="parameters", rounds=2, epochs=10, lr=0.01, teacher_weight=0.5)
tuned = saved("after training: tuned", tersor.run(model, [slim, *STORE], DATA), now)

now = time.perf_counter()
during = tersor.Penalize(bits=0.5, epochs=40, lr=0.01)
saved("during training: a price on bits", tersor.run(model, [during, tersor.Entropy()], DATA), now)

# New data comes every month: the same structure is trained on, and only the change is shipped.
x, y = spirals(512, seed=7)
month = tersor.Task("new spirals", train=tersor.TensorBatches(x, y, batch=64), evaluate=DATA.evaluate)
later = tersor.run(tuned, [tersor.Finetune(epochs=5, lr=0.001), tersor.Entropy()], month)
later = shipped("retrained on new data", tuned, later)

# The device needs room: the next smaller point, as a patch too.
slim = tersor.Slim(keep=0.3, of="parameters", epochs=10, lr=0.01)
smaller = tersor.run(later, [slim, tersor.Entropy()], DATA)
shipped("deployed: the next smaller point", later, smaller)
