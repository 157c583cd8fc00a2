"""The errors a user can meet, each with one clear line as its message."""


class MegaTrainError(Exception):
    """Base of all errors that MegaTrain raises on purpose."""


class ConfigError(MegaTrainError, ValueError):
    """A setting, file or argument is wrong; the message names it, its value and what would be right."""


class CapacityError(MegaTrainError):
    """Something does not fit in memory; the message names the bytes missing, by category."""


class IntegrityError(MegaTrainError):
    """Stored or held state is not what it should be (a detached parameter, a damaged file)."""


class UnsupportedModelError(MegaTrainError):
    """The model does something that cannot be recomputed exactly; the message names the unit and the object."""


class NonFiniteGradientError(MegaTrainError):
    """A gradient is inf or NaN where the step cannot be skipped, because units were already updated."""
