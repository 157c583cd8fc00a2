"""What a run tells of itself while it trains, and whom: its own files, the user, and programs that show runs."""

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from megatrain.sizes import format_seconds
from megatrain.train.entries import record_evaluation
from megatrain.train.evaluate import Evaluation
from megatrain.train.held_out import Measured
from megatrain.train.loggers import Loggers
from megatrain.train.metrics import MetricsFile
from megatrain.train.progress import Progress
from megatrain.train.run_folder import RunFolder
from megatrain.trust.ledger import LedgerWriter

_SHOWN_OF_PAIRS = ("rewards/accuracies", "rewards/margins")
_MOST_SHOWN, _PROMPT_SHOWN = 600, 60  # characters of a sample, and the last ones of its prompt; samples.jsonl has all


class Journal:
    """Steps into metrics.jsonl and to `loggers`; evaluations there, too, into the ledger, and before the user's eyes;
    what the model wrote into samples.jsonl."""

    def __init__(self, folder: RunFolder, ledger: LedgerWriter, loggers: Loggers, progress: Progress) -> None:
        self._folder, self._ledger, self._loggers, self._progress = folder, ledger, loggers, progress
        self._stack = ExitStack()
        self._stack.callback(loggers.close)
        self._metrics = self._stack.enter_context(MetricsFile(folder.metrics))
        self._samples: MetricsFile | None = None  # until there is one

    def write(self, line: dict[str, Any]) -> None:
        """A step's line."""
        self._metrics.write(line)
        self._loggers.step(line)

    def evaluated(self, measured: Measured) -> None:
        """What was measured after a step."""
        self._metrics.write(measured.line())
        if measured.samples and self._samples is None:
            self._samples = self._stack.enter_context(MetricsFile(self._folder.samples))
        for sample in measured.samples:
            assert self._samples is not None
            self._samples.write({"step": measured.step, "prompt": sample.prompt, "text": sample.text})
        record_evaluation(self._ledger, measured.step, measured.results)
        self._progress.say("\n".join(lines_of(measured)))
        self._loggers.evaluation(measured)

    @property
    def lost(self) -> int:
        """Lines of metrics.jsonl that could not be written."""
        return self._metrics.lost

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def lines_of(measured: Measured) -> list[str]:
    """For people."""
    lines = [f"step {measured.step}  {name}: {described(one)}" for name, one in measured.results.items()]
    standing = "the lowest so far" if measured.without == 0 else f"no improvement in {_evaluations(measured.without)}"
    lines[-1] += f"  ({format_seconds(measured.seconds)}; {standing})"
    for number, sample in enumerate(measured.samples, start=1):
        shown = _readable(sample.prompt[-_PROMPT_SHOWN:])
        lines.append(f"  {number}. {shown if len(shown) == len(sample.prompt) else '...' + shown!r} goes on:")
        lines += [f"     | {line}" for line in _readable(sample.text).splitlines()]
    if measured.enough:
        lines.append(
            f"training ends here, at step {measured.step}: no improvement in {_evaluations(measured.without)} "
            "(eval.patience)"
        )
    return lines


def _evaluations(count: int) -> str:
    return f"{count} evaluation{'s' if count > 1 else ''}"


def described(one: Evaluation) -> str:
    if one.pairs is not None:
        reported = "".join(f"  {name} {value:.4g}" for name, value in one.values.items() if name in _SHOWN_OF_PAIRS)
        return f"loss {one.loss:.4f}{reported}  over {one.pairs:,} pairs"
    bits = f"  {one.bits_per_byte:.3f} bits per byte" if one.bits_per_byte is not None else ""
    return f"loss {one.loss:.4f}  perplexity {one.perplexity:,.2f}{bits}  over {one.target_tokens:,} tokens"


def _readable(text: str) -> str:
    """What would move a terminal's cursor is written out."""
    cut = text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + " ..."
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in cut)
