"""The command line in forks of one interpreter that has imported the libraries: real processes without two seconds of imports each.

    with ForkedCli() as cli:
        run = cli("convert", folder, "--out", out)          # run.code, run.out, run.err
        cli("convert", folder, "--out", out, die_at=DieAt("os.rename", "indexer-state.safetensors", 2))

`die_at` makes the process kill itself with SIGKILL inside the n-th occurrence of an audit event on a path: what kill -9 does, at an
exact point. `limits` are resource limits (name of resource.RLIMIT_* -> bytes,
or "+N MiB" on top of what is in use) of that process alone.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# One thread, so that sums have one order. Quiet libraries, as cli.main() asks before it imports them.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "COLUMNS": "200",
}


@dataclass(frozen=True)
class DieAt:
    """The `nth` audit event `event` whose first or second argument is a path that ends with `path`."""

    event: str
    path: str
    nth: int = 1


@dataclass(frozen=True)
class Run:
    """code: exit status, negative for a signal. out, err: what the process wrote."""

    code: int
    out: str
    err: str


class ForkedCli:
    """Starts command lines one after another; a context manager. environment: on top of this process's own."""

    def __init__(self, **environment: str) -> None:
        self._environment = {**os.environ, **_ENVIRONMENT, **environment}

    def __enter__(self) -> "ForkedCli":
        self._folder = tempfile.TemporaryDirectory()
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()
        self._folder.cleanup()

    def __call__(self, *arguments: Any, **options: Any) -> Run:
        """Run to the end."""
        self.start(*arguments, **options)
        return self.wait()

    def start(
        self,
        *arguments: Any,
        stdin: str = "",
        cwd: Path | None = None,
        die_at: DieAt | None = None,
        limits: dict[str, int | str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Start a process and return its id; call `wait` before the next."""
        files = {name: str(Path(self._folder.name, name)) for name in ("stdin", "stdout", "stderr")}
        Path(files["stdin"]).write_text(stdin)
        request = {"arguments": list(map(str, arguments)), "cwd": str(cwd or "."), "limits": limits or {}, **files}
        request["environment"] = environment or {}
        self._say({**request, "die_at": asdict(die_at) if die_at else None})
        return int(self._hear())

    def wait(self) -> Run:
        """The result of the process that was started last."""
        code = int(self._hear())
        return Run(code, *(Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")))

    def _say(self, request: Any) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()

    def _hear(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


def _serve() -> None:
    # What every command imports in the end.
    import rtpurbo.converter.convert
    import rtpurbo.converter.hub
    import rtpurbo.runtime.verify  # noqa: F401

    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            _child(request)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _child(request: dict[str, Any]) -> None:
    from rtpurbo.cli import main

    code = 1
    try:
        for number, (name, flags) in enumerate(
            (("stdin", os.O_RDONLY), *((n, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) for n in ("stdout", "stderr")))
        ):
            os.dup2(os.open(request[name], flags), number)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        for name, value in request["limits"].items():
            value = _absolute(value) if isinstance(value, str) else value
            resource.setrlimit(getattr(resource, name), (value, value))
        if request["die_at"]:
            _die_at(DieAt(**request["die_at"]))
        main(args=request["arguments"], prog_name="rtpurbo")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _absolute(more: str) -> int:
    """Bytes of "+N MiB" on top of the address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize() + (int(more.split()[0]) << 20)


def _die_at(point: DieAt) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == point.event and any(isinstance(a, (str, os.PathLike)) and os.fspath(a).endswith(point.path) for a in arguments[:2]):
            seen += 1
            if seen == point.nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    _serve()
