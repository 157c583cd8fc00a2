"""Tests of the CUDA device: skipped without a GPU, below four minutes on one.

    pytest tests/gpu
    MEGATRAIN_TEST_DEVICE=lagged pytest tests/gpu     on the host, what does not need CUDA itself: a test of the tests

Comparisons are to the last bit, with deterministic kernels; new device memory is then filled with NaN, too, which shows
what is read too early.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# deterministic products need one of two settings, before CUDA starts; this one takes little memory for each thread
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
sys.path.append(str(Path(__file__).parents[2] / "src"))  # where the package is not installed

import on_gpu
import pytest
import test_engine_toys as toys
import torch


def pytest_itemcollected(item: pytest.Item) -> None:
    """One process has the GPU, where the suite runs in several."""
    if Path(__file__).parent in item.path.parents:
        item.add_marker(pytest.mark.xdist_group("gpu"))


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> None:
    """In place of the fixture that hides it from the other tests."""


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not on_gpu.AVAILABLE:
        pytest.skip("no CUDA device that PyTorch can use")
    # parameters of whole multiples of 256 bytes: they are aligned alike in a slot and in memory of their own, and
    # libraries choose kernels by that, too
    monkeypatch.setattr(toys, "WIDTH", 64)
    monkeypatch.setattr(toys, "VOCABULARY", 128)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
    gc.collect()
    if not on_gpu.DRY:
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
