"""What all benchmarks share. Importing it first sets the environment of libraries that read theirs as they are loaded,
and makes the package of this checkout the one that is measured."""

import os
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
SOURCES = BENCHMARKS.parent / "src"

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need, before CUDA starts
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path[:0] = [folder for folder in (str(BENCHMARKS), str(SOURCES)) if folder not in sys.path]
