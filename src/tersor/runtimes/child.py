"""Child: the entry of a process that runs one function and hands back one result. Started by contained.py.

stdin   two pickles: (sys.path, the folder of tersor), then (module, name of the function, arguments)
stdout  one pickle: (True, the result) or (False, an error of tersor.errors)
tersor is a package without its __init__ here, because that imports torch: 3 seconds and 500 MB for nothing.
"""

import importlib
import os
import pickle
import sys
import types


def main() -> None:
    """Run the function. Any other error ends the process with a traceback on stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints goes with its errors
    sys.path[:], folder = pickle.load(sys.stdin.buffer)
    bare = types.ModuleType("tersor")
    bare.__path__ = [folder]
    sys.modules["tersor"] = bare
    from tersor.errors import TersorError

    module, name, args = pickle.load(sys.stdin.buffer)
    try:
        answer = True, getattr(importlib.import_module(module), name)(*args)
    except TersorError as error:
        answer = False, error
    with out:
        pickle.dump(answer, out, pickle.HIGHEST_PROTOCOL)
    os._exit(0)  # not through the destructors of libraries, which crash at times and take longer


if __name__ == "__main__":
    main()
