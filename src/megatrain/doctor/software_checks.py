"""Checks of installed versions, the environment and the process's limits."""

from collections.abc import Iterator
from itertools import zip_longest

from megatrain.doctor.facts import Facts, release
from megatrain.doctor.finding import Finding

# a waiting thread that spins takes a large share of so few cores
_FEW_CORES = 8
_FEW_FILES = 1024  # the usual limit; a model's shards, its data and its libraries stay well below


def versions(facts: Facts) -> Iterator[Finding]:
    for name, least in facts.software.required.items():
        found = facts.software.packages.get(name)
        if found is None:
            what = f"{name} is not installed"
        elif _is_older(found, least):
            what = f"{name} {found} is older than {least}"
        else:
            continue
        yield Finding("problem", what, f"pip install --upgrade '{name}>={least}'")


def _is_older(version: str, least: str) -> bool:
    """2.11 is as new as 2.11.0."""
    pairs = zip_longest(release(version), release(least), fillvalue=0)
    return next((one < other for one, other in pairs if one != other), False)


def musl(facts: Facts) -> Iterator[Finding]:
    if (facts.system.libc or "").startswith("musl"):
        yield Finding(
            "warning",
            "the C library is musl: PyTorch publishes no builds for it, and freed memory is not returned as on glibc",
            "use a glibc system or image, such as Debian or Ubuntu",
        )


def numba_cache(facts: Facts) -> Iterator[Finding]:
    software = facts.software
    if software.numba_cache is None and software.numba_cache_folders:
        yield Finding(
            "warning",
            f"numba can write to none of {', '.join(software.numba_cache_folders)}: every start compiles all kernels",
            "set NUMBA_CACHE_DIR to a folder that can be written",
        )


def open_files(facts: Facts) -> Iterator[Finding]:
    limit = facts.system.open_files_limit
    if isinstance(limit, int) and limit < _FEW_FILES:
        yield Finding("warning", f"this process may open only {limit} files", "`ulimit -n 4096` before starting")


def encoding(facts: Facts) -> Iterator[Finding]:
    name = facts.software.encoding
    if name is not None and name.lower().replace("_", "-") not in ("utf-8", "utf8", "cp65001"):
        yield Finding(
            "note",
            f"the locale's encoding is {name}: generated text may not print",
            "set PYTHONUTF8=1, or a UTF-8 locale such as LANG=C.UTF-8",
        )


def spinning_threads(facts: Facts) -> Iterator[Finding]:
    policy, threads = facts.software.environment.get("OMP_WAIT_POLICY"), facts.cpu.threads
    if threads is None or threads > _FEW_CORES:
        return
    if (policy or "").strip().lower() == "active":
        yield Finding(
            "warning",
            f"OMP_WAIT_POLICY is {policy}: threads that wait keep a core busy, and there are {threads}",
            "set OMP_WAIT_POLICY=PASSIVE, or unset it: the megatrain command then does",
        )
    elif policy is None:
        yield Finding(
            "note",
            f"OMP_WAIT_POLICY is not set: your own programs' waiting threads spin for a while on {threads} cores",
            "set OMP_WAIT_POLICY=PASSIVE for those; the megatrain command does by itself",
        )


def thread_count(facts: Facts) -> Iterator[Finding]:
    text, threads = facts.software.environment.get("OMP_NUM_THREADS", ""), facts.cpu.threads
    count = text.split(",")[0].strip()  # one number per nesting level
    if threads is None or not count.isdecimal():
        return
    if int(count) == 1 and threads > 1:
        what = f"OMP_NUM_THREADS is 1: PyTorch and the optimizer use one of {threads} cores"
    elif int(count) > threads:
        what = f"OMP_NUM_THREADS is {count}, and {threads} threads can run at once"
    else:
        return
    yield Finding("warning", what, f"unset OMP_NUM_THREADS, or set it to {threads}")


SOFTWARE_CHECKS = (versions, musl, numba_cache, open_files, encoding, spinning_threads, thread_count)
