"""Of many combinations some for every run of the suite, and the rest for `make test-long`."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def some_of(one_in: int, *settings: Iterable[Any]) -> list[Any]:
    """All combinations, of which one in `one_in` is not marked `long`. With `one_in` prime to the number of each
    setting's values, every value is among them."""
    marks = {True: [], False: pytest.mark.long}
    return [pytest.param(*each, marks=marks[n % one_in == 1]) for n, each in enumerate(product(*settings))]
