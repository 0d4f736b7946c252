"""`run_program`: what `subprocess.run([sys.executable, ...])` does, without paying for the imports of torch each time.

The program is a fork of the server that `run_ranks` uses as well, which has imported torch, transformers and datasets
once. It gets the arguments, the environment, the folder, the streams and the session of a new process, and runs as
`__main__`; under torchrun its workers are forks of the launcher. So only the imports differ. What depends on them (an
environment variable that a library reads while it is imported, the interpreter's own options) needs a real process:
a changed variable of that kind gets one here, too.
"""

import atexit
import contextlib
import gc
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch", "torch.distributed", "torch._dynamo", "torch.distributed.run", "pytest",
    "transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto", "datasets",
]  # fmt: skip
# Read while Python starts or a library is imported. PYTHONPATH is set anew in the fork.
READ_AT_IMPORT = (
    "HF_", "TRANSFORMERS_", "DATASETS_", "TOKENIZERS_", "TORCH", "CUDA_", "LD_", "MALLOC_", "GLIBC_", "LANG", "LC_",
    "HOME", "XDG_", "PYTHON", "TMPDIR", "SAFETENSORS_", "KMP_", "MKL_",
)  # fmt: skip
_server_environment: dict[str, str] = {}


def fork_context() -> Any:
    """multiprocessing's context whose server has the libraries; without forks (Windows) it starts processes anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    if not _server_environment:
        _server_environment.update(os.environ)
    return context


def run_program(
    words: Sequence[str | Path],
    *,
    timeout: float = 120,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | str | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """`python WORDS...`, a script, -m MODULE or -c CODE with its arguments -> its exit code and its two streams.

    `env`: changes to this process's environment, where None removes a variable; OMP_NUM_THREADS is 1 unless it says
    otherwise. One that runs longer than `timeout` seconds gets SIGTERM, then SIGKILL: an AssertionError with what it
    had written.
    """
    command = [sys.executable, *map(str, words)]
    changes: dict[str, str | None] = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    variables = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    context = fork_context()
    kept = {name for name in {*variables, *_server_environment} if name.startswith(READ_AT_IMPORT)} - {"PYTHONPATH"}
    folder = Path(cwd or ROOT)
    with tempfile.TemporaryDirectory() as streams:
        paths = [os.path.join(streams, name) for name in ("in", "out", "err")]
        Path(paths[0]).write_text(stdin)
        if context.get_start_method() == "spawn" or any(
            variables.get(name) != _server_environment.get(name) for name in kept
        ):
            process: Any = _Started(command, variables, folder, paths)
        else:
            process = context.Process(target=_become, args=(command[1:], variables, str(folder), paths))
            process.start()
        process.join(timeout)
        hung = process.exitcode is None
        if hung:
            process.terminate()  # torchrun ends its workers, which are in sessions of their own
            process.join(40)
            if process.exitcode is None:
                process.kill()
                process.join()
        out, err = (Path(path).read_bytes().decode(errors="replace") for path in paths[1:])
    if hung:
        raise AssertionError(f"{command} ran longer than {timeout} s\n{out[-4000:]}\n{err[-8000:]}")
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


class _Started:
    """A real process with the few methods of multiprocessing's that are used here."""

    def __init__(self, command: list[str], variables: dict[str, str], folder: Path, paths: list[str]) -> None:
        with open(paths[0], "rb") as stdin, open(paths[1], "wb") as out, open(paths[2], "wb") as err:
            self._process = subprocess.Popen(
                command, env=variables, cwd=folder, stdin=stdin, stdout=out, stderr=err, start_new_session=True
            )
        self.terminate, self.kill = self._process.terminate, self._process.kill

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)


def _become(words: list[str], variables: dict[str, str], folder: str, paths: list[str]) -> None:
    """In the fork: be the process that the command line would have started, and end as it would."""
    os.setsid()
    for number, path in enumerate(paths):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT if number else os.O_RDONLY, 0o600), number)
    _run(words, variables, folder)


def _run(words: list[str], variables: dict[str, str], folder: str) -> None:
    """What the interpreter does with its command line; never returns."""
    code = 1
    gc.freeze()  # as in helpers.py
    try:
        os.closerange(3, 256)  # the server's pipes: who outlives the tests must not keep it alive
        # multiprocessing knows them by number, and would write into, or close, whatever gets that number next.
        vars(resource_tracker._resource_tracker).update(_fd=None, _pid=None)
        vars(forkserver._forkserver).update(
            _forkserver_address=None, _forkserver_alive_fd=None, _forkserver_pid=None, _inherited_fds=None
        )
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.default_int_handler if name == signal.SIGINT else signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        for stream, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
            raw = open(number, mode + "b", closefd=False, buffering=0 if mode == "w" else -1)  # noqa: SIM115
            text = io.TextIOWrapper(raw, encoding="utf-8", write_through=mode == "w")
            setattr(sys, stream, text)
            setattr(sys, f"__{stream}__", text)
        import torch

        torch.set_num_threads(int(variables.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        added = [path for path in variables.get("PYTHONPATH", "").split(os.pathsep) if path]
        words = [word for word in words if word != "-u"]
        if words[0] in ("-c", "-m"):
            sys.argv = [words[0], *words[2:]]
            sys.path[:0] = [os.getcwd() if words[0] == "-m" else "", *added]
        else:
            sys.argv = words
            sys.path[:0] = [os.path.dirname(os.path.abspath(words[0])), *added]
        if words[:2] == ["-m", "torch.distributed.run"]:
            _let_torchrun_fork()
        if words[0] == "-m":
            sys.modules.pop(words[1], None)  # else runpy warns that it is there already
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.modules["__main__"] = module = types.ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), module.__dict__)
        else:
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            for stream_ in (sys.stdout, sys.stderr):
                stream_.flush()
        finally:
            os._exit(code & 0xFF)


def _let_torchrun_fork() -> None:
    """torchrun starts `python -u SCRIPT ...` for each rank: a fork of the launcher does what that would do."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    started = SubprocessHandler._popen

    def popen(handler: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        if args[0] != sys.executable:
            return started(handler, args, env)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for stream, number in ((handler._stdout, 1), (handler._stderr, 2)):
                if stream is not None:
                    os.dup2(stream.fileno(), number)
            _run(list(args[1:]), env, os.getcwd())
        return _Forked(args, pid)

    SubprocessHandler._popen = popen  # type: ignore[method-assign, assignment]


class _Forked(subprocess.Popen[str]):
    """A child of this process as Popen shows one."""

    def __init__(self, args: tuple[str, ...], pid: int) -> None:
        self.args, self.pid, self.returncode = list(args), pid, None
        self.stdin = self.stdout = self.stderr = None
        self._child_created, self._sigint_wait_secs = True, 0.25
        self._waitpid_lock = threading.Lock()
        self._communication_started, self._input, self.pipesize = False, None, -1
        self.text_mode = self.encoding = self.errors = None


ROOT = Path(__file__).resolve().parent.parent
