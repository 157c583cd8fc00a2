"""Checks of the GPUs, the driver and the PyTorch build that drives them."""

from collections.abc import Iterator

from megatrain.doctor.facts import Facts, Gpu, release
from megatrain.doctor.finding import Finding
from megatrain.sizes import format_bytes

_GET_TORCH = "install a CUDA build of PyTorch as https://pytorch.org/get-started/locally says"
# a driver and a desktop hold some memory on every GPU; more than this share is somebody's work
_HELD_SHARE = 0.05


def torch_import(facts: Facts) -> Iterator[Finding]:
    error = facts.gpu.torch.import_error
    if error is not None:
        yield Finding("problem", f"PyTorch cannot be imported: {error}", "install it again: pip install torch")


def no_gpu(facts: Facts) -> Iterator[Finding]:
    """One reason: the first that explains it all."""
    torch = facts.gpu.torch
    if torch.import_error is not None or torch.version is None or torch.devices or _driver_is_too_old(facts):
        return
    if facts.gpu.hardware:
        what, remedy = _why_unusable(facts)
        yield Finding("problem", f"PyTorch cannot use the GPU of this machine: {what}", remedy)
    elif facts.system.wsl is not None:
        remedy = "install NVIDIA's driver on Windows (not in Linux)"
        if facts.system.wsl == 1:
            remedy = "only WSL 2 has GPUs: `wsl --set-version <distribution> 2`"
        yield Finding("warning", "no NVIDIA GPU found: training computes on the CPU", remedy)
    else:
        build = "" if torch.cuda else " (and PyTorch is built without CUDA)"
        yield Finding(
            "warning",
            f"no NVIDIA GPU found{build}: training computes on the CPU",
            "enough for small models; for large ones take a machine with an NVIDIA GPU",
        )


def _why_unusable(facts: Facts) -> tuple[str, str]:
    """(reason, remedy) where there is a GPU."""
    driver, torch = facts.gpu.driver, facts.gpu.torch
    visible = facts.software.environment.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda is None:
        return f"PyTorch {torch.version} is built without CUDA", _GET_TORCH
    if "mismatch" in (driver.nvidia_smi_error or ""):
        return "the driver was updated since the machine started", "restart the machine"
    if facts.system.wsl is None and not driver.loaded and not driver.device_files:
        return "no NVIDIA driver is loaded", "install NVIDIA's driver, or load it: `sudo modprobe nvidia`"
    if facts.system.wsl is None and not driver.device_files:
        if facts.system.container is not None:
            return "this container was started without GPUs", "start it with them (docker run --gpus all)"
        return "the driver is loaded and /dev/nvidia0 is missing", "make it: `sudo nvidia-modprobe -c 0 -u`"
    if driver.denied_files:
        denied = ", ".join(driver.denied_files)
        return f"no permission to open {denied}", "join the group that may (`ls -l /dev/nvidia*`), or run as its user"
    if visible is not None and (visible.strip() in ("", "-1") or "NoDevFiles" in visible):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it", "unset CUDA_VISIBLE_DEVICES, or name a GPU: 0"
    reason = torch.unusable_because or driver.nvidia_smi_error or "unknown"
    return reason, "see whether `nvidia-smi` works; `dmesg | grep -i nvidia` has the driver's own words"


def driver_too_old(facts: Facts) -> Iterator[Finding]:
    if _driver_is_too_old(facts):
        driver = facts.gpu.driver
        version = f"driver {driver.version}" if driver.version else "driver"
        most = f" (it runs CUDA up to {driver.cuda})" if driver.cuda else ""
        yield Finding(
            "problem",
            f"the NVIDIA {version} is too old for PyTorch's CUDA {facts.gpu.torch.cuda}{most}",
            "update the driver, or install a PyTorch build for an older CUDA (https://pytorch.org/get-started/locally)",
        )


def _driver_is_too_old(facts: Facts) -> bool:
    """CUDA runs on drivers of its own major version from the first one on, so only major versions count."""
    torch, driver = facts.gpu.torch, facts.gpu.driver
    if torch.cuda is None or torch.devices:
        return False
    ours, theirs = release(torch.cuda), release(driver.cuda)
    return "driver on your system is too old" in (torch.unusable_because or "") or ((0,) < theirs[:1] < ours[:1])


def unsupported_architecture(facts: Facts) -> Iterator[Finding]:
    """Machine code runs on its own generation (the same major version) and no older member of it."""
    built_for = [name.removeprefix("sm_").rstrip("af") for name in facts.gpu.torch.architectures if "sm_" in name]
    codes = [int(code) for code in built_for if code.isdecimal()]
    for device in facts.gpu.torch.devices:
        capability = release(device.compute_capability)
        if not codes or len(capability) != 2:
            continue
        if not any(code // 10 == capability[0] and code % 10 <= capability[1] for code in codes):
            yield Finding(
                "problem",
                f"PyTorch {facts.gpu.torch.version} has no kernels for {device.name} (compute capability "
                f"{device.compute_capability}); it has {', '.join(facts.gpu.torch.architectures)}",
                "install a PyTorch build for this GPU (https://pytorch.org/get-started/locally)",
            )


def no_native_bf16(facts: Facts) -> Iterator[Finding]:
    for device in facts.gpu.torch.devices:
        if facts.gpu.torch.cuda and (0,) < release(device.compute_capability)[:1] < (8,):
            yield Finding(
                "note",
                f"{device.name} (compute capability {device.compute_capability}) computes no bf16",
                "engine.precision auto takes fp32 on it, with twice the bytes to copy; bf16 needs Ampere or newer",
            )


def narrow_link(facts: Facts) -> Iterator[Finding]:
    for gpu in facts.gpu.gpus:
        width, most = gpu.pcie_width, gpu.pcie_width_max
        if width is not None and most is not None and width < most:
            yield Finding(
                "warning",
                f"{gpu.label} has {width} PCIe lanes of {most}: weights stream at {width / most:.0%} of full speed",
                "seat it in a slot with all lanes, without a riser; see how the mainboard shares lanes with M.2 slots",
            )


def slow_link(facts: Facts) -> Iterator[Finding]:
    """An idle GPU slows its link down to save power, so only one at full speed (P0) is suspicious."""
    for gpu in facts.gpu.gpus:
        now, most = gpu.pcie_generation, gpu.pcie_generation_max
        if now is None or most is None or now >= most:
            continue
        what = f"the PCIe link of {gpu.label} runs at generation {now} of {most}"
        if gpu.performance_state == "P0":
            yield Finding("warning", what, "set the slot to its highest generation in the firmware; try without riser")
        else:
            state = f" (it is idle, at {gpu.performance_state})" if gpu.performance_state else ""
            yield Finding("note", what + state, "look again while it computes; if it stays so, see the firmware's slot")


def other_processes(facts: Facts) -> Iterator[Finding]:
    for gpu in facts.gpu.gpus:
        held = _held_share(gpu)
        if not gpu.processes and held < _HELD_SHARE:
            continue
        names = ", ".join(f"{other.name or 'process'} (pid {other.pid})" for other in gpu.processes[:3])
        more = f" and {len(gpu.processes) - 3} more" if len(gpu.processes) > 3 else ""
        amount = "memory"
        if gpu.used_bytes is not None and gpu.memory_bytes is not None:
            amount = f"{format_bytes(gpu.used_bytes)} of {format_bytes(gpu.memory_bytes)}"
        yield Finding(
            "warning" if held >= _HELD_SHARE else "note",
            f"others hold {amount} on {gpu.label}: {names or 'processes that cannot be seen from here'}{more}",
            "end them, or choose another GPU (engine.device: cuda:1)",
        )


def _held_share(gpu: Gpu) -> float:
    if not gpu.memory_bytes or gpu.used_bytes is None:
        return 0.0
    return gpu.used_bytes / gpu.memory_bytes


GPU_CHECKS = (
    torch_import,
    no_gpu,
    driver_too_old,
    unsupported_architecture,
    no_native_bf16,
    narrow_link,
    slow_link,
    other_processes,
)
