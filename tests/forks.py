"""Processes of their own that need not import torch again: each is a fork of one that only has imported.

`run` and `start` take the words of a command line of Python: -c CODE, -m MODULE or a file, with arguments.
The fork has its own descriptors, folder, environment and arguments, runs the code as __main__, and ends as
every interpreter does, except that it takes nothing apart in memory. It shares what an interpreter chooses as
it starts: the seed of hashes, and the threads that OMP_NUM_THREADS gives. Where that counts, or what is
imported, use subprocess.
"""

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
AT_FIRST = dict(os.environ)  # before any test changes it
LINE = "import forks, sys; forks.ended(lambda: forks.become(forks.served(*sys.argv[1:])))"


class Child:
    """A process that was started. Its output, where it was not given a descriptor, is in files."""

    def __init__(self, words: Sequence[object], *, stdout: int | None, stderr: int | None, env: Any, of: str):
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        given = zip(self.files, (stdout, stderr), strict=True)
        out, err = (file.fileno() if fd is None else fd for file, fd in given)
        request = {"words": [str(word) for word in words], "cwd": os.getcwd(), "env": dict(env or os.environ)}
        self.server = server(of)
        with tempfile.TemporaryFile() as file:  # longer than a message may be
            file.write(json.dumps(request).encode())
            file.flush()
            socket.send_fds(self.server, [b"start"], [file.fileno(), out, err])
        self.pid: int = json.loads(self.server.recv(64))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, minus the signal that ended it. TimeoutError after some seconds."""
        if self.returncode is None:
            self.server.settimeout(timeout)
            try:
                self.returncode = json.loads(self.server.recv(64))
            finally:
                self.server.settimeout(None)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(BlockingIOError, TimeoutError):
            self.wait(0)
        return self.returncode

    def kill(self) -> int:
        """Kill it, unless it has ended, and wait."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def read(self) -> tuple[str, str]:
        """What it has written."""
        found = [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self.files]
        return found[0], found[1]


def start(
    words: Sequence[object],
    *,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    of: str = "tersor",
) -> Child:
    """Start a process, of one that has imported "tersor" or only "numba". Wait for it before the next one is
    started."""
    return Child(words, stdout=stdout, stderr=stderr, env=env, of=of)


def run(
    words: Sequence[object],
    *,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    of: str = "tersor",
    check: bool = False,
) -> SimpleNamespace:
    """Start a process and wait: what subprocess.run returns with text and captured output."""
    child = start(words, stdout=stdout, stderr=stderr, env=env, of=of)
    code = child.wait()
    out, err = child.read()
    if check and code:
        raise subprocess.CalledProcessError(code, list(words), out, err)
    return SimpleNamespace(returncode=code, stdout=out, stderr=err)


@cache
def server(of: str) -> socket.socket:
    """The socket to the process that forks. It ends when the socket is closed, with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    path = os.pathsep.join([str(HERE), *listed(AT_FIRST)])
    process = subprocess.Popen(
        [sys.executable, "-c", LINE, str(theirs.fileno()), of], pass_fds=[theirs.fileno()],
        env={**AT_FIRST, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, cwd=HERE,
    )  # fmt: skip
    theirs.close()
    threading._register_atexit(lambda: (ours.close(), process.wait()))  # type: ignore[attr-defined]
    return ours


def served(number: str, of: str) -> dict[str, Any]:
    """In the process that forks: serve requests until there are no more; in a fork return its request."""
    {"tersor": tersor_imported, "numba": numba_imported}[of]()
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    requests = socket.socket(fileno=int(number))
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 16, 3)
        if not message:
            sys.exit()
        child = os.fork()
        if not child:
            requests.close()
            os.lseek(fds[0], 0, os.SEEK_SET)
            with open(fds[0], "rb") as file:
                request = json.load(file)
            for fd, place in zip(fds[1:], (1, 2), strict=True):
                os.dup2(fd, place)
                os.close(fd)
            return request
        for fd in fds:
            os.close(fd)
        requests.send(json.dumps(child).encode())
        requests.send(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def ended(code: Callable[[], None]) -> None:
    """Run some code and leave as an interpreter does: exit functions, then the streams are flushed."""
    status = 0
    try:
        code()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        status = 120
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


def tersor_imported() -> None:
    """Import what commands and trainings use, load the compiled loops, and trace once, which imports too."""
    import accelerate  # noqa: F401
    import torch

    import tersor.cli
    import tersor.pipeline  # noqa: F401
    from tersor.compiled import compile_module, loop_modules
    from tersor.model.graph import traced

    for module in loop_modules():
        compile_module(module)
    traced(torch.nn.Linear(1, 1), (torch.ones(1, 1),))


def numba_imported() -> None:
    """Import numba, and compile once, which imports most of it."""
    from numba import njit

    njit("int64(int64)", nogil=True)(lambda n: n + 1)


def become(request: dict[str, Any]) -> None:
    """Run the request's code as __main__."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.dont_write_bytecode, tempfile.tempdir = bool(os.environ.get("PYTHONDONTWRITEBYTECODE")), None
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()
    sys.stdout, sys.stderr = opened(1, "strict"), opened(2, "backslashreplace")
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    kind, *rest = request["words"]
    before, paths = {"", str(HERE), *listed(AT_FIRST)}, listed(os.environ)
    sys.path[:] = [*paths, *(path for path in sys.path if path not in before)]
    if kind == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        code = compile(rest[0], "<string>", "exec")
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    elif kind == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = [kind, *rest], [str(Path(kind).parent)]
        runpy.run_path(kind, run_name="__main__")


def listed(env: Mapping[str, str]) -> list[str]:
    return [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]


def opened(fd: int, errors: str) -> io.TextIOWrapper:
    """A standard stream, as an interpreter opens it."""
    lines = os.isatty(fd) or fd == 2
    return open(fd, "w", 1 if lines else -1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
