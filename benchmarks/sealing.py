"""How fast state is sealed and opened, on one thread, with each cipher; and a plain copy of the same bytes beside it.

    python benchmarks/sealing.py --mib 256 --rounds 5

What is timed takes turns, round after round; medians are shown. GB is 10^9 bytes.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness  # noqa: F401 (first: it prepares the environment)
from harness.machine import cpu_name

from megatrain.memory.sealed_spill import STRETCH_BYTES
from megatrain.trust.encryption import ALGORITHMS, KEY_BYTES, NONCE_BYTES, TAG_BYTES, aead, preferred_algorithm


def build_cases(plain: memoryview) -> dict[str, Callable[[], None]]:
    """What is timed, by name. Each goes over all of `plain`, a stretch at a time."""
    sealed = memoryview(bytearray(STRETCH_BYTES + TAG_BYTES))
    opened = memoryview(bytearray(STRETCH_BYTES))
    starts = range(0, len(plain), STRETCH_BYTES)

    def copy() -> None:
        for start in starts:
            opened[:] = plain[start : start + STRETCH_BYTES]

    cases: dict[str, Callable[[], None]] = {"copy": copy}
    for algorithm in ALGORITHMS:
        cipher, nonce = aead(algorithm, os.urandom(KEY_BYTES)), bytes(NONCE_BYTES)  # nothing here is a secret
        one = memoryview(bytearray(STRETCH_BYTES + TAG_BYTES))
        cipher.encrypt_into(nonce, plain[:STRETCH_BYTES], None, one)

        def seal(cipher: Any = cipher, nonce: bytes = nonce) -> None:
            for start in starts:
                cipher.encrypt_into(nonce, plain[start : start + STRETCH_BYTES], None, sealed)

        def unseal(cipher: Any = cipher, nonce: bytes = nonce, one: memoryview = one) -> None:
            for _ in starts:
                cipher.decrypt_into(nonce, one, None, opened)

        cases |= {f"{algorithm}, seal": seal, f"{algorithm}, open": unseal}
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    plain = memoryview(os.urandom(options.mib << 20))
    cases = build_cases(plain)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(f"{cpu_name()}; {preferred_algorithm()} is chosen here; stretches of {STRETCH_BYTES >> 20} MiB")
    for name, found in seconds.items():
        print(f"{name:<26} {len(plain) / statistics.median(found) / 1e9:6.2f} GB/s")


if __name__ == "__main__":
    main()
