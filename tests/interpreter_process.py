"""A process in which Triton interprets kernels on the CPU: Triton reads TRITON_INTERPRET when a kernel is decorated."""

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

Operation = Callable[[dict[str, Any]], Any]


@contextmanager
def interpreting(test_file: str) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """Yields call(operation, request) -> answer; the test file ends with `if __name__ == "__main__": serve(OPERATIONS)`."""
    # The folder of the tests must be named: with PYTHONSAFEPATH a script's own folder is not searched.
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    worker = subprocess.Popen([sys.executable, test_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert worker.stdin is not None
    assert worker.stdout is not None

    def call(operation: str, request: dict[str, Any]) -> Any:
        write_message(worker.stdin, {"operation": operation, "request": request})
        answer = read_message(worker.stdout)
        assert answer is not None, "the interpreting process ended: see its traceback"
        return answer

    yield call
    worker.stdin.close()
    worker.wait(timeout=60)


def serve(operations: dict[str, Operation]) -> None:
    """The interpreting process: requests on stdin, answers on stdout."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while (message := read_message(sys.stdin.buffer)) is not None:
        write_message(answers, operations[message["operation"]](message["request"]))


def read_message(stream: BinaryIO) -> Any:
    header = stream.read(8)
    return torch.load(io.BytesIO(stream.read(struct.unpack("<q", header)[0])), weights_only=True) if header else None


def write_message(stream: BinaryIO, message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
    stream.flush()
