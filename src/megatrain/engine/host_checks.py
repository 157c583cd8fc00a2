"""Weights where the host is its own compute device: they are looked at where they lie, before they are used."""

from megatrain.memory.checksum_book import ChecksumBook
from megatrain.memory.store import ALL_UNITS_STRAY, HostStore
from megatrain.model.partition import Partition


class HostChecks:
    def __init__(self, store: HostStore, part: Partition, book: ChecksumBook) -> None:
        self._book = book
        self._regions = {unit.index: store.regions_read(unit.index, unit.slots) for unit in part.units}
        self._regions[ALL_UNITS_STRAY] = store.regions_read(ALL_UNITS_STRAY, part.strays)

    def before_use(self, unit: int) -> None:
        """Raise IntegrityError where weights that `unit` reads are not what they were left as. No update is pending."""
        for region in self._regions[unit]:
            if self._book.due(region.unit):
                self._book.check_region(region)
