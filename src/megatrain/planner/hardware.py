"""What a machine offers: memories, rates and costs, from a profile that comes along or a YAML file of the user's.

Every figure of a profile says in `sources` where it comes from: a data sheet, an estimate or an assumption. Only what
`probe` found on this machine is called measured.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatrain.config_kinds import AT_LEAST_0, BYTES, TEXT, Kind, or_null, real, whole
from megatrain.errors import ConfigError
from megatrain.yaml_file import read_yaml

PROFILES = Path(__file__).parent / "profiles"
_SHARE = real("a number above 0, at most 1", lambda number: 0 < number <= 1)


_RATE = real("a number of at least 1, per second", lambda number: 1 <= number < float("inf"))


def _key(kind: Kind, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"kind": kind})


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine with one compute device. Memory in bytes, bandwidths in bytes per second.

    `matmul_flops` is what the device could do in dense bf16 products, in operations per second, `matmul_flops_fp32` in
    fp32 ones without TF32, the two efficiencies the shares that large products and attention reach. `device_memory`
    None: the host computes in its own memory. `host_bandwidth` is what the host's optimizer reaches, the reads and
    writes that it must do counted once.
    """

    name: str = _key(TEXT, "")
    description: str = _key(TEXT, "")
    device_memory: int | None = _key(or_null(BYTES))
    matmul_flops: float = _key(_RATE)
    matmul_flops_fp32: float | None = _key(or_null(_RATE), None)
    matmul_efficiency: float = _key(_SHARE)
    attention_efficiency: float = _key(_SHARE)
    device_bandwidth: float = _key(_RATE)
    h2d_bandwidth: float = _key(_RATE)
    d2h_bandwidth: float = _key(_RATE)
    host_memory: int = _key(BYTES)
    host_bandwidth: float = _key(_RATE)
    cores: int = _key(whole(1))
    nvme_read: float = _key(_RATE)
    nvme_write: float = _key(_RATE)
    watts: float = _key(AT_LEAST_0)
    dollars_per_hour: float = _key(AT_LEAST_0)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def computes_in_host_memory(self) -> bool:
        return self.device_memory is None

    def in_precision(self, precision: str) -> "Hardware":
        """With the products of `precision`, bf16 or fp32, as `matmul_flops`. Raises ConfigError where those are not
        known."""
        if precision == "bf16":
            return self
        if self.matmul_flops_fp32 is None:
            raise ConfigError(
                f"hardware {self.name}: matmul_flops_fp32: missing; a plan in fp32 needs it: operations per second of"
                " products in fp32"
            )
        return replace(self, matmul_flops=self.matmul_flops_fp32)

    @property
    def product_rate(self) -> float:
        """Operations per second that large products reach."""
        return self.matmul_flops * self.matmul_efficiency

    @property
    def attention_rate(self) -> float:
        return self.matmul_flops * self.attention_efficiency


FIGURES = {spec.name: spec for spec in dataclasses.fields(Hardware) if spec.name not in ("name", "sources")}


def profile_names() -> list[str]:
    """Profiles that come along."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_hardware(name_or_file: str) -> Hardware:
    """A profile by its name, or a YAML file with the same keys. Raises ConfigError naming the key that is wrong."""
    if name_or_file in profile_names():
        return parse_hardware(read_yaml(PROFILES / f"{name_or_file}.yaml"), name_or_file)
    path = Path(name_or_file)
    if not path.is_file():
        raise ConfigError(
            f"--hardware: {name_or_file!r} is no file and none of {', '.join(profile_names())}; give one of these or a "
            "YAML file with the same keys"
        )
    return parse_hardware(read_yaml(path), path.stem)


def parse_hardware(values: Mapping[str, Any], name: str) -> Hardware:
    """A Hardware from a mapping, every key and value checked. Raises ConfigError."""
    for key in values:
        if key not in FIGURES and key not in ("name", "sources"):
            near = difflib.get_close_matches(str(key), FIGURES, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIGURES)}"
            raise ConfigError(f"hardware {name}: {key}: unknown key; {hint}")
    if not isinstance(values.get("name", name), str):
        raise ConfigError(f"hardware {name}: name: {values['name']!r} is wrong; expected text")
    found: dict[str, Any] = {"name": values.get("name", name), "sources": _sources(values.get("sources"), name)}
    for key, spec in FIGURES.items():
        kind: Kind = spec.metadata["kind"]
        if key not in values:
            if spec.default is dataclasses.MISSING:
                raise ConfigError(f"hardware {name}: {key}: missing; expected {kind.expected}")
            continue
        try:
            found[key] = kind.parse(values[key])
        except (ValueError, TypeError, OverflowError):
            raise ConfigError(f"hardware {name}: {key}: {values[key]!r} is wrong; expected {kind.expected}") from None
    return Hardware(**found)


def _sources(value: Any, name: str) -> dict[str, str]:
    """Where each figure comes from, by its key."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"hardware {name}: sources: {value!r} is wrong; expected a mapping from keys to texts")
    for key in value:
        if key not in FIGURES:
            raise ConfigError(f"hardware {name}: sources.{key}: unknown key; there are {', '.join(FIGURES)}")
    return {str(key): str(text) for key, text in value.items()}
