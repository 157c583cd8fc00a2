"""MegaTrain: exact full-precision training of models far larger than the device that computes them."""

from typing import TYPE_CHECKING, Any

from megatrain.errors import CapacityError, ConfigError, IntegrityError
from megatrain.version import __version__

if TYPE_CHECKING:
    from megatrain import losses
    from megatrain.engine.engine import Engine
    from megatrain.optim.adamw import AdamW
    from megatrain.trainers.mixin import StreamedTrainerMixin

__all__ = [
    "AdamW",
    "CapacityError",
    "ConfigError",
    "Engine",
    "IntegrityError",
    "StreamedTrainerMixin",
    "__version__",
    "losses",
]


def __getattr__(name: str) -> Any:
    # torch and numba take seconds to import; `megatrain --version` should not wait for them
    if name == "Engine":
        from megatrain.engine.engine import Engine

        return Engine
    if name == "AdamW":
        from megatrain.optim.adamw import AdamW

        return AdamW
    if name == "StreamedTrainerMixin":
        from megatrain.trainers.mixin import StreamedTrainerMixin

        return StreamedTrainerMixin
    if name == "losses":
        import megatrain.losses

        return megatrain.losses
    raise AttributeError(f"module 'megatrain' has no attribute {name!r}")
