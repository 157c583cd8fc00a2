"""Units timed on this machine: one of each kind, with random weights, forward and backward, at the plan's shapes; and
what the engine itself takes around them."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from megatrain.device.base import ComputeDevice, streams
from megatrain.engine.engine import Engine
from megatrain.memory.limits import host_memory_limits
from megatrain.model.partition import Unit, partition
from megatrain.model.trees import FlatTree
from megatrain.planner.durations import Measured, UnitTimes
from megatrain.planner.probe import synchronize
from megatrain.planner.workload import UnitWork, Workload

_SECONDS = 2.0  # that a kind of unit may take at most, all runs together
_RUNS = 4
_OTHER_BYTES = 1 << 26  # that the host reads and writes between two runs: more than its caches hold
_TINY_ENGINES, _TINY_STEPS = (2, 12), 15  # blocks of models of next to no work, and steps of each
_MEMORY_SHARE = 8  # a unit is timed where its weights take less than this fraction of the free memory


def measure_units(workload: Workload, device: ComputeDevice, micro_batch: int, product_rate: float) -> Measured:
    """Times for micro-batches of `micro_batch` sequences. Units that are too large to be tried are left out, and
    sequences that would take too long are cut, their times scaled by what there is to compute."""
    timed: dict[int, UnitTimes] = {}
    by_kind: dict[object, UnitTimes | None] = {}
    modules = {u.index: u for u in partition(workload.model).units}
    for work in workload.units:
        kind = (
            type(modules[work.index].module),
            work.flops,
            work.graph,
            work.inputs,
            work.image_bytes,
        )  # flops tell what is trained
        if kind not in by_kind:
            by_kind[kind] = _time_unit(workload, work, modules[work.index], device, micro_batch, product_rate)
        times = by_kind[kind]
        if times is not None:
            timed[work.index] = times
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()  # for the engine, whose blocks have other sizes
    return Measured(timed, 0.0 if streams(device) else _engine_seconds(len(workload.units)))


def _engine_seconds(units: int) -> float:
    """Of a step on the host beside what units compute: calls, threads, gradients and updates, by two models that
    compute next to nothing. Beside a device with memory of its own the host works ahead of it."""
    few, many = (_tiny_step_seconds(blocks) for blocks in _TINY_ENGINES)
    each = max(0.0, many - few) / (_TINY_ENGINES[1] - _TINY_ENGINES[0])
    return max(0.0, few - 2 * each) + units * each


@cache  # a plan is made twice: to be refused early, and with times
def _tiny_step_seconds(blocks: int) -> float:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with Engine(_Tiny(blocks), device="cpu", precision="fp32", keep_graphs="off") as engine:
        found = [engine.train_step([{"input_ids": ids, "labels": ids}]).seconds for _ in range(_TINY_STEPS)]
    return statistics.median(found)


class _Tiny(nn.Module):
    """Blocks of one small matrix, and a loss."""

    shifts_labels = False

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.table(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return {"loss": nn.functional.cross_entropy(hidden.flatten(0, 1), labels.flatten())}


def _time_unit(
    workload: Workload, work: UnitWork, unit: Unit, device: ComputeDevice, micro_batch: int, product_rate: float
) -> UnitTimes | None:
    run = workload.runs.get(work.index)
    if run is None or run.arguments is None or work.image_bytes * _MEMORY_SHARE > host_memory_limits().free_bytes:
        return None
    length = _affordable_length(workload, work, micro_batch, product_rate)
    try:
        module = _materialised(unit.module, device.torch_device)
        if work.index in workload.head:
            return _time_head(workload, module, run.arguments, device, micro_batch)
        inputs = _inputs(run.arguments, workload.seq_len, length, micro_batch, module, device.torch_device)
        forward, backward = _seconds(module, run.arguments, inputs, device)
    except (RuntimeError, TypeError, ValueError, IndexError):  # a unit that random inputs do not suit
        return None
    scale = _flops(work, workload.seq_len) / _flops(work, length)
    return UnitTimes(micro_batch, forward * scale, backward * scale)


def _flops(work: UnitWork, length: int) -> float:
    return work.flops.forward(length) or length


def _affordable_length(workload: Workload, work: UnitWork, micro_batch: int, product_rate: float) -> int:
    """The sequence length, halved until all runs of forward and backward stay within the time."""
    length = workload.seq_len
    while length > 64 and 3 * _RUNS * micro_batch * work.flops.forward(length) > _SECONDS * product_rate:
        length //= 2
    return length


def _materialised(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy with random weights, where the unit would compute."""
    real = copy.deepcopy(module).to_empty(device=device)
    with torch.no_grad():
        for parameter in real.parameters():
            parameter.uniform_(-0.02, 0.02)
        for buffer in real.buffers():
            buffer.zero_()
    return real


def _inputs(
    arguments: FlatTree, seq_len: int, length: int, micro_batch: int, module: nn.Module, device: torch.device
) -> list[Tensor]:
    """Random tensors in the shapes of one sequence's: hidden states and token ids in a batch, the rest as it is."""
    carried = any(t.requires_grad for t in arguments.tensors)
    tensors = []
    for like in arguments.tensors:
        shape = [length if n == seq_len else n for n in like.shape]
        if like.requires_grad or not carried:
            shape[0] *= micro_batch
        if like.is_floating_point():
            made = torch.randn(shape, device=device).to(like.dtype)
        elif like.dtype == torch.bool:
            made = torch.ones(shape, dtype=torch.bool, device=device)
        else:
            made = torch.randint(0, _rows(module), shape, dtype=like.dtype, device=device)
        tensors.append(made.requires_grad_(like.requires_grad))
    return tensors


def _rows(module: nn.Module) -> int:
    """What indices may be at most, where they look something up."""
    return min((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=1)


def _seconds(
    module: nn.Module, arguments: FlatTree, inputs: list[Tensor], device: ComputeDevice
) -> tuple[float, float]:
    """(forward, backward), each as in a step: with caches that others have filled."""
    wanted = [t for t in (*inputs, *module.parameters()) if t.requires_grad]
    outputs: list[Tensor] = []

    def forward() -> None:
        args, kwargs = arguments.build(inputs)
        with torch.enable_grad(), device.computing():
            outputs[:] = [t for t in _tensors(module(*args, **kwargs)) if t.requires_grad]

    def backward() -> None:
        with device.computing():
            if not wanted:
                return  # frozen, and nothing before it is trained
            torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)

    seconds = _settled_seconds([forward, backward], device.torch_device)
    return seconds[0], seconds[1]


def _settled_seconds(parts: list[Callable[[], None]], device: torch.device) -> list[float]:
    """Of each of `parts`, which are run one after the other, several times: the median, without the first."""
    others = torch.zeros(0 if device.type == "cuda" else _OTHER_BYTES // 4)
    found = [[_timed(part, others, device) for part in parts] for _ in range(_RUNS)]
    return [statistics.median(times) for times in zip(*found[1:], strict=True)]


def _timed(run: Callable[[], None], others: Tensor, device: torch.device) -> float:
    """Seconds of `run`, once `others` have taken the caches."""
    others.add_(1)
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from _tensors(value)


def _time_head(
    workload: Workload, module: nn.Module, arguments: FlatTree, device: ComputeDevice, micro_batch: int
) -> UnitTimes:
    """A chunk with its loss, its backward and the sum of its weights' gradient, as often as there are chunks."""
    tokens = min(workload.chunk_tokens, micro_batch * workload.seq_len)
    like = next(t for t in arguments.tensors if t.is_floating_point())
    hidden = torch.randn(1, tokens, like.shape[-1], device=device.torch_device).to(like.dtype).requires_grad_()
    labels = torch.randint(0, workload.vocabulary, (tokens,), device=device.torch_device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in parameters]

    def chunk() -> None:
        with torch.enable_grad(), device.computing():
            logits = module(hidden)
            loss = nn.functional.cross_entropy(logits.view(tokens, -1).float(), labels)
            found = torch.autograd.grad(loss, [hidden, *parameters])
        for total, gradient in zip(sums, found[1:], strict=True):
            total.add_(gradient)

    chunks = micro_batch * workload.seq_len / tokens
    return UnitTimes(micro_batch, 0.0, _settled_seconds([chunk], device.torch_device)[0] * chunks)
