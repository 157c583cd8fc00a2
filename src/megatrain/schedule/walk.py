"""The visits of a pass as they come, held against its schedule. Pure."""

from collections.abc import Iterator

from megatrain.schedule.operations import Kind, Operation, Schedule, Visit


class Walk:
    """Where a pass is: its visits so far, and the schedule they are held against."""

    def __init__(self, kind: str, schedule: Schedule | None, elements: int = 0) -> None:
        self.kind = kind
        self.elements = elements  # of all forwards that wait for their backward at the same time
        self._open_elements = elements
        self._differentiated = False  # since the last forward began
        self.schedule = schedule
        self.deviated = False
        self.visits: list[Visit] = []  # without a kind, outside of passes, the last one alone
        self._forgotten = 0
        self.small: dict[int, None] = {}  # units that are no visits, in the order of their first use
        self._grouped = False
        self._issued = 0  # operations of the schedule
        self._played = -1  # the last visit whose operations are issued

    def further_forward(self, elements: int) -> None:
        """A backward in between has taken what was open before, as in a loop that adds up gradients."""
        if self._differentiated:
            self._open_elements, self._differentiated = 0, False
        self._open_elements += elements
        self.elements = max(self.elements, self._open_elements)

    @property
    def number(self) -> int:
        """Of the visit that is under way."""
        return self._forgotten + len(self.visits) - 1

    def arrive(self, unit: int, backward: bool, together: bool) -> bool:
        """Record that `unit` is about to run; whether that begins a visit (or makes one larger)."""
        self._differentiated |= backward
        current = self.visits[-1] if self.visits else Visit(())
        if unit in current.units and (current.backward or not backward):
            return False
        if together and self._grouped:
            self.visits[-1] = Visit((*current.units, unit), backward=True)
        else:  # units that run together are differentiated at once
            self.visits.append(Visit((unit,), backward or together))
        self._grouped = together
        if not self.kind and len(self.visits) > 1:
            self._forgotten += len(self.visits) - 1
            del self.visits[:-1]
        return True

    def use_small(self, unit: int) -> None:
        self.small.setdefault(unit)

    def as_expected(self) -> bool:
        assert self.schedule is not None
        if self.number >= len(self.schedule.visits):
            return False
        expected = self.schedule.visits[self.number].units
        return self.visits[-1].units == expected[: len(self.visits[-1].units)]

    def operations_up_to_now(self) -> Iterator[Operation]:
        """Operations of the schedule that are not issued yet, up to the current visit's own."""
        assert self.schedule is not None
        operations = self.schedule.operations
        while self._played < self.number:
            operation = operations[self._issued]
            self._issued += 1
            if operation.kind is Kind.COMPUTE:
                self._played = operation.visit
            yield operation
