"""Units timed on this machine: one of each kind, with random weights, forward and backward, at the plan's shapes."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from megatrain.device.base import ComputeDevice
from megatrain.memory.limits import host_memory_limits
from megatrain.model.partition import Unit, partition
from megatrain.model.trees import FlatTree
from megatrain.planner.durations import Measured, UnitTimes
from megatrain.planner.probe import best_seconds
from megatrain.planner.workload import UnitWork, Workload

_SECONDS = 2.0  # that a kind of unit may take at most, all runs together
_RUNS = 4
_MEMORY_SHARE = 8  # a unit is timed where its weights take less than this fraction of the free memory


def measure_units(workload: Workload, device: ComputeDevice, micro_batch: int, product_rate: float) -> Measured:
    """Times for micro-batches of `micro_batch` sequences. Units that are too large to be tried are left out, and
    sequences that would take too long are cut, their times scaled by what there is to compute."""
    timed: dict[int, UnitTimes] = {}
    by_kind: dict[object, UnitTimes | None] = {}
    modules = {u.index: u for u in partition(workload.model).units}
    for work in workload.units:
        kind = (type(modules[work.index].module), work.flops, work.graph, work.inputs, work.image_bytes)
        if kind not in by_kind:
            by_kind[kind] = _time_unit(workload, work, modules[work.index], device, micro_batch, product_rate)
        times = by_kind[kind]
        if times is not None:
            timed[work.index] = times
    if device.torch_device.type == "cuda":
        torch.cuda.empty_cache()  # for the engine, whose blocks have other sizes
    return Measured(timed)


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
        forward, both = _seconds(module, run.arguments, inputs, device)
    except (RuntimeError, TypeError, ValueError, IndexError):  # a unit that random inputs do not suit
        return None
    scale = _flops(work, workload.seq_len) / _flops(work, length)
    return UnitTimes(micro_batch, forward * scale, (both - forward) * scale)


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
    """(forward, forward and backward)."""
    wanted = [*(t for t in inputs if t.requires_grad), *module.parameters()]

    def forward() -> list[Tensor]:
        args, kwargs = arguments.build(inputs)
        with torch.enable_grad(), device.computing():
            return [t for t in _tensors(module(*args, **kwargs)) if t.requires_grad]

    def both() -> None:
        outputs = forward()
        with device.computing():
            torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)

    return best_seconds(forward, device.torch_device), best_seconds(both, device.torch_device)


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
    like = next(t for t in arguments.tensors if t.requires_grad)
    hidden = torch.randn(1, tokens, like.shape[-1], device=device.torch_device).to(like.dtype).requires_grad_()
    labels = torch.randint(0, workload.vocabulary, (tokens,), device=device.torch_device)
    parameters = list(module.parameters())
    sums = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in parameters]

    def chunk() -> None:
        with torch.enable_grad(), device.computing():
            logits = module(hidden)
            loss = nn.functional.cross_entropy(logits.view(tokens, -1).float(), labels)
            found = torch.autograd.grad(loss, [hidden, *parameters])
        for total, gradient in zip(sums, found[1:], strict=True):
            total.add_(gradient)

    chunks = micro_batch * workload.seq_len / tokens
    return UnitTimes(micro_batch, 0.0, best_seconds(chunk, device.torch_device) * chunks)
