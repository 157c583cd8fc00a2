"""Command lines whose errors are one line, like all others."""

import argparse
from typing import NoReturn

from megatrain.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print how to use it, and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")
