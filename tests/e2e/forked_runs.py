"""`megatrain` commands in processes of their own that need not import anything first.

A process that has imported all of it, and has started no thread, forks one child for each command; what the machine can
do, which a run measures for seconds, is taken as described. As a program: reads one JSON object a line on standard
input and answers each with one on standard output.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, or -9 where it was killed; what it printed; its peak of resident memory."""

    code: int
    output: str
    peak_bytes: int


class ForkedRuns:
    """Commands are run one after the other, or started and waited for, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        # The C library gives back what is freed: kept in pieces, as chance would have it, peaks differ by 3%.
        environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=folder,
            env=environment | {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments: str, no_room_for: str | None = None) -> tuple[int, Path]:
        """(its process, where its output goes) of a command that runs from now on. `no_room_for`: what is in the paths
        of files for which the disk is full."""
        self._number += 1
        log = self.folder / f"{self._number}.log"
        return int(self._ask({"start": arguments, "log": str(log), "no_room_for": no_room_for})), log

    def wait(self, process: int, log: Path) -> Ended:
        code, peak_bytes = self._ask({"wait": process})
        return Ended(code, log.read_text(), peak_bytes)

    def run(self, *arguments: str, no_room_for: str | None = None) -> Ended:
        return self.wait(*self.start(*arguments, no_room_for=no_room_for))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def _serve() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401 (what a run imports when it knows its model)
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import megatrain.train.bench
    import megatrain.trust.verify  # noqa: F401
    from megatrain import cli
    from megatrain.memory import pieces
    from megatrain.train import planning

    pieces.PIECE_ELEMENTS = 4096  # so that state of small models is spilled, too
    planning.measured_here = lambda _config, _workload, device: (planning.describe_machine(device), None)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: Any = _watch(request["wait"])
        else:
            answer = os.fork()
            if not answer:
                if request["no_room_for"] is not None:
                    _fill_disk(request["no_room_for"])
                _become(cli.main, request["start"], request["log"])
        print(json.dumps(answer), flush=True)


def _watch(process: int) -> tuple[int, int]:
    """(exit code, peak of its own memory in bytes, each 2 milliseconds). Not the kernel's own peak of what is
    resident: that counts pages of libraries, which come by chance."""
    peak_kib = 0
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), peak_kib * 1024
        with open(f"/proc/{process}/status") as stream:
            own = [line.split()[1] for line in stream if line.startswith(("RssAnon", "RssShmem"))]
        peak_kib = max(peak_kib, sum(map(int, own)))
        time.sleep(2e-3)


def _fill_disk(part: str) -> None:
    """For new files with that in their path."""
    real = os.open

    def full(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if part in str(path) and flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, flags, *rest, **named)

    os.open = full


def _become(main: Any, arguments: list[str], log: str) -> None:
    """The child: never returns."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = main(arguments)
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
