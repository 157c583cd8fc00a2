"""Liger on CPU tensors, by Triton's interpreter: slow, and the same arithmetic.

The interpreter must be chosen before Triton is imported, by TRITON_INTERPRET=1 in the environment. Two things that
Triton's compiler has are added to it: Python floats as arguments of kernels, and functions of libdevice.
"""

import importlib
import os
import pkgutil
import sys
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def prepare() -> None:
    """Make Liger's kernels run on the host. Triton and Liger are installed."""
    import liger_kernel.ops
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return own(argument)

    interpreter._implicit_cvt = converted
    stand_ins = {"rsqrt": lambda x: 1.0 / tl.sqrt(x), "tanh": lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0}
    for name in ("cross_entropy", "geglu", "layer_norm", "rms_norm"):
        importlib.import_module(f"liger_kernel.ops.{name}")
    for found in pkgutil.iter_modules(liger_kernel.ops.__path__, "liger_kernel.ops."):
        module = sys.modules.get(found.name)
        for name, stand_in in stand_ins.items():
            if "libdevice" in str(getattr(getattr(module, name, None), "__module__", "")):
                setattr(module, name, stand_in)
