"""A plan as people read it, as JSON, and as a timeline for Perfetto."""

from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from megatrain.device.trace import Trace
from megatrain.planner.placement import DEVICE, HOST, NVME
from megatrain.planner.plan import Plan
from megatrain.planner.simulate import COMPUTE, RESOURCES
from megatrain.sizes import format_bytes, format_seconds

_TIERS = (DEVICE, HOST, NVME)
_MEANING = {
    "compute": "the device computes",
    "up": "copies to the device",
    "down": "copies to the host",
    "host": "the host's optimizer",
    "nvme": "NVMe reads and writes",
}


def plan_json(plan: Plan, tokens: int | None = None) -> dict[str, Any]:
    """Everything in plain values. Bytes are whole numbers, times seconds."""
    placement, simulation, workload = plan.placement, plan.simulation, plan.workload
    return {
        "fits": plan.fits,
        "missing_bytes": plan.missing_bytes,
        "bytes": plan.ledger,
        "placement": {
            "tiers": {tier: _names(plan, tier) for tier in _TIERS if placement.units_in(tier)},
            "micro_batch": placement.micro_batch,
            "slots": placement.slots,
            "inputs_leave": placement.inputs_leave,
            "moments": placement.moments,
            "clip_scope": placement.clip_scope,
            "kept_graphs": len(placement.kept),
            "sequence_part_tokens": workload.part_tokens if placement.chunked else None,
        },
        "bytes_per_parameter": plan.bytes_per_parameter,
        "step_seconds": simulation.step_seconds,
        "bound_by": simulation.bound_by,
        "tokens_per_second": plan.tokens_per_second,
        "missing": plan.candidate.missing,
        "available": {tier: n for tier, n in plan.available.items() if n},
        "busy_seconds": dict(simulation.busy),
        "exposed_seconds": dict(simulation.exposed),
        "h2d_bytes": simulation.h2d_bytes,
        "d2h_bytes": simulation.d2h_bytes,
        "model": workload.name,
        "parameters": workload.parameters,
        "active_parameters": workload.active_parameters,
        "precision": workload.precision,
        "seq_len": workload.seq_len,
        "tokens_per_step": plan.tokens,
        "model_flops": plan.flops.model,
        "hardware_flops": plan.flops.hardware,
        "matmul_flops": plan.hardware.matmul_flops,
        "hardware": plan.hardware.name,
        "hardware_sources": dict(plan.hardware.sources),
        "remedies": [
            {
                "change": r.change,
                "saves_bytes": r.saves_bytes,
                "missing_bytes": r.missing_bytes,
                "fits": r.fits,
            }
            for r in plan.remedies
        ],
        "for_tokens": None if tokens is None else _for_tokens(plan, tokens),
    }


def _names(plan: Plan, tier: str) -> list[str]:
    names = {u.index: u.name or "model" for u in plan.workload.homes}
    return [names[unit] for unit in plan.placement.units_in(tier)]


def _for_tokens(plan: Plan, tokens: int) -> dict[str, Any]:
    """Time, energy and cost; null where the hardware's watts or price are not known."""
    seconds = tokens / plan.tokens_per_second if plan.tokens_per_second else 0.0
    hours = seconds / 3600
    return {
        "tokens": tokens,
        "days": hours / 24,
        "kwh": hours * plan.hardware.watts / 1000 if plan.hardware.watts else None,
        "dollars": hours * plan.hardware.dollars_per_hour if plan.hardware.dollars_per_hour else None,
    }


def print_plan(plan: Plan, tokens: int | None = None, stream: TextIO | None = None) -> None:
    """Short tables, no wider than 100 columns."""
    console = Console(file=stream, width=100, highlight=False, soft_wrap=True, color_system=None)
    workload = plan.workload
    active = f", {_count(workload.active_parameters)} active" if _is_sparse(plan) else ""
    console.print(
        f"{workload.name}: {_count(workload.parameters)} parameters{active}, {workload.precision}, on "
        f"{plan.hardware.description or plan.hardware.name}"
    )
    console.print(
        f"{plan.tokens:,} tokens per step, in sequences of {workload.seq_len:,}; micro-batches of "
        f"{plan.placement.micro_batch}"
    )
    if not workload.complete:
        console.print("The model could not be run in shapes alone: activations and their order are estimates.")
    console.print(_bytes_table(plan))
    console.print(_placement_lines(plan))
    _print_verdict(console, plan)
    console.print(_time_table(plan))
    _print_speed(console, plan, tokens)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _is_sparse(plan: Plan) -> bool:
    return plan.workload.active_parameters < 0.7 * plan.workload.parameters


def _bytes_table(plan: Plan) -> Table:
    tiers = [tier for tier in _TIERS if plan.ledger.get(tier)]
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes")
    for tier in tiers:
        table.add_column(tier, justify="right")
    categories = list(dict.fromkeys(name for tier in tiers for name in plan.ledger[tier]))
    for name in categories:
        cells = [format_bytes(plan.ledger[tier][name]) if name in plan.ledger[tier] else "" for tier in tiers]
        table.add_row(name, *cells)
    table.add_row("in all", *(format_bytes(plan.peak_bytes(tier)) for tier in tiers))
    table.add_row("can be had", *(_size(plan.available.get(tier, 0)) for tier in tiers))
    return table


def _size(n_bytes: int) -> str:
    return format_bytes(n_bytes) if n_bytes < 1 << 60 else "any"


def _placement_lines(plan: Plan) -> str:
    placement, total = plan.placement, len(plan.workload.homes)
    where = {tier: len(placement.units_in(tier)) for tier in _TIERS if placement.units_in(tier)}
    parts = [f"state of {count} of {total} units: {tier}" for tier, count in where.items()]
    if DEVICE in plan.ledger:
        parts += [
            f"{placement.slots} slots per size",
            f"inputs {'leave for the host' if placement.inputs_leave else 'stay'}",
        ]
    if placement.chunked:
        parts.append(f"norms and feed-forward over {plan.workload.part_tokens:,} tokens at a time")
    if placement.kept:
        parts.append(f"{len(placement.kept)} graphs kept")
    parts += [f"{placement.moments} moments", f"clipping: {placement.clip_scope}"]
    return f"{'; '.join(parts)}\n{plan.bytes_per_parameter:.2f} bytes per parameter of state"


def _print_verdict(console: Console, plan: Plan) -> None:
    if plan.fits:
        console.print("It fits.")
        return
    missing = " and ".join(f"{format_bytes(n)} of {tier} memory" for tier, n in plan.candidate.missing.items())
    console.print(f"It does not fit: {missing} missing.")
    table = Table(box=None, pad_edge=False)
    for name in ("instead", "saves", "then"):
        table.add_column(name, justify="right" if name == "saves" else "left")
    for remedy in plan.remedies:
        then = "fits" if remedy.fits else f"{format_bytes(remedy.missing_bytes)} missing"
        table.add_row(remedy.change, format_bytes(remedy.saves_bytes), then)
    console.print(table)


def _time_table(plan: Plan) -> Table:
    simulation = plan.simulation
    table = Table(box=None, pad_edge=False)
    table.add_column("predicted step")
    for name in ("busy", "exposed"):
        table.add_column(name, justify="right")
    for resource in RESOURCES:
        if simulation.busy[resource]:
            exposed = "" if resource == COMPUTE else format_seconds(simulation.exposed.get(resource, 0.0))
            table.add_row(_MEANING[resource], format_seconds(simulation.busy[resource]), exposed)
    table.add_row("in all", format_seconds(simulation.step_seconds), "")
    return table


def _print_speed(console: Console, plan: Plan, tokens: int | None) -> None:
    flops, seconds = plan.flops, plan.simulation.step_seconds
    console.print(
        f"bound by {plan.simulation.bound_by}; {plan.tokens_per_second:,.0f} tokens/s; "
        f"{_rate(flops.model / seconds)} of the model, {_rate(flops.hardware / seconds)} with what is computed again"
    )
    if tokens is not None:
        found = _for_tokens(plan, tokens)
        energy = f", {found['kwh']:,.0f} kWh" if found["kwh"] is not None else ""
        cost = f", ${found['dollars']:,.0f}" if found["dollars"] is not None else ""
        console.print(f"{tokens:,} tokens: {found['days']:,.1f} days{energy}{cost}")


def _rate(flops_per_second: float) -> str:
    value = flops_per_second / 1e12
    return f"{value:,.0f} TFLOP/s" if value >= 10 else f"{value:.3g} TFLOP/s"


def write_timeline(plan: Plan, path: Path) -> None:
    """The steady step, in the format of `--profile`."""
    trace = Trace()
    for task in plan.simulation.tasks:
        if task.end > task.start:
            trace.add(task.resource, task.label, task.start, task.end)
    trace.write(path, float)
