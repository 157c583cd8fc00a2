"""From facts to findings. Every check is a pure function of the facts; what is unknown gives no finding."""

from collections.abc import Callable, Iterator

from megatrain.doctor.facts import Facts
from megatrain.doctor.finding import LEVELS, Finding
from megatrain.doctor.gpu_checks import GPU_CHECKS
from megatrain.doctor.host_checks import HOST_CHECKS
from megatrain.doctor.software_checks import SOFTWARE_CHECKS

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (*GPU_CHECKS, *SOFTWARE_CHECKS, *HOST_CHECKS)


def find(facts: Facts) -> list[Finding]:
    """All findings, problems first."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))
