"""`megatrain doctor`: every finding from made-up facts, the report and the exit code."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatrain import cli
from megatrain.doctor import host, report
from megatrain.doctor.facts import (
    CpuFacts,
    Disk,
    DriverFacts,
    Facts,
    Gpu,
    GpuFacts,
    GpuProcess,
    MemoryFacts,
    NumaNode,
    SoftwareFacts,
    StorageFacts,
    SystemFacts,
    TorchDevice,
    TorchFacts,
)
from megatrain.doctor.finding import LEVELS, Finding
from megatrain.doctor.findings import CHECKS, find

GIB = 1024**3

GPU = Gpu(
    index=0,
    name="H100",
    pci_address="0000:3b:00.0",
    numa_node=0,
    memory_bytes=80 * GIB,
    used_bytes=GIB,
    compute_capability="9.0",
    native_bf16=True,
    pcie_generation=5,
    pcie_generation_max=5,
    pcie_width=16,
    pcie_width_max=16,
    performance_state="P0",
)
GOOD = Facts(
    system=SystemFacts(kernel="6.1.0", architecture="x86_64", libc="glibc 2.36", open_files_limit=4096),
    cpu=CpuFacts(name="EPYC", physical_cores=32, logical_cores=64, usable_cores=64, instruction_sets=("AVX2",)),
    memory=MemoryFacts(
        total_bytes=512 * GIB,
        available_bytes=500 * GIB,
        free_bytes=500 * GIB,
        nodes=(NumaNode(0, 256 * GIB, 250 * GIB, "0-31"), NumaNode(1, 256 * GIB, 250 * GIB, "32-63")),
        swap_total_bytes=GIB,
        swap_used_bytes=0,
        locked_limit="unlimited",
        huge_pages="always",
        overcommit_mode=0,
    ),
    storage=StorageFacts("/work", 1000 * GIB, 900 * GIB, "ext4"),
    gpu=GpuFacts(
        (GPU,),
        DriverFacts("580.65.06", "13.0", True, ("/dev/nvidia0",)),
        TorchFacts("2.13.0", cuda="13.0", architectures=("sm_80", "sm_90"), devices=(TorchDevice("H100", GIB, "9.0"),)),
    ),
    software=SoftwareFacts(
        python="3.12.1",
        packages={"torch": "2.13.0"},
        required={"torch": "2.11"},
        encoding="UTF-8",
        numba_cache_folders=("/a",),
        numba_cache="/a",
        environment={"OMP_WAIT_POLICY": "PASSIVE"},
    ),
)


def change(facts: Facts = GOOD, **sections: dict[str, Any]) -> Facts:
    """`change(memory={"huge_pages": "never"})`."""
    return replace(facts, **{name: replace(getattr(facts, name), **fields) for name, fields in sections.items()})


def driver(**fields: Any) -> dict[str, Any]:
    return {"driver": replace(GOOD.gpu.driver, **fields)}


def torch(**fields: Any) -> dict[str, Any]:
    return {"torch": replace(GOOD.gpu.torch, **fields)}


def card(**fields: Any) -> dict[str, Any]:
    return {"gpus": (replace(GPU, **fields),)}


def device(**fields: Any) -> dict[str, Any]:
    return torch(devices=(replace(GOOD.gpu.torch.devices[0], **fields),))


def environment(**variables: str) -> dict[str, Any]:
    return {"environment": variables}


def unusable(reason: str = "a reason", **fields: Any) -> dict[str, Any]:
    return torch(devices=(), unusable_because=reason, **fields)


BARE = change(gpu={"gpus": (), "driver": DriverFacts(), **unusable("No CUDA GPUs are available")})
"""A machine without a GPU, and with a CUDA build of PyTorch."""
CPU_BUILD = unusable("it is built for the CPU alone", cuda=None, architectures=())
OLD = "The NVIDIA driver on your system is too old (found version 11040)."
SMALL = change(cpu={"usable_cores": 2}, software=environment())

# check: (facts, level, part of what it says) that it must say
TRIGGERS: dict[str, list[tuple[Facts, str, str]]] = {
    "torch_import": [
        (change(gpu=torch(import_error="libcudart.so.13: cannot open")), "problem", "imported: libcudart.so.13")
    ],
    "no_gpu": [
        (BARE, "warning", "no NVIDIA GPU found: training computes on the CPU"),
        (change(BARE, gpu=CPU_BUILD), "warning", "(and PyTorch is built without CUDA)"),
        (change(BARE, system={"wsl": 1}), "warning", "no NVIDIA GPU found"),
        (change(BARE, system={"wsl": 2}), "warning", "no NVIDIA GPU found"),
        (change(gpu=CPU_BUILD), "problem", "PyTorch 2.13.0 is built without CUDA"),
        (
            change(
                gpu=unusable() | driver(nvidia_smi_error="Failed to initialize NVML: Driver/library version mismatch")
            ),
            "problem",
            "the driver was updated",
        ),
        (change(gpu=unusable() | {"driver": DriverFacts()}), "problem", "no NVIDIA driver is loaded"),
        (change(gpu=unusable() | driver(device_files=())), "problem", "/dev/nvidia0 is missing"),
        (
            change(gpu=unusable() | driver(device_files=()), system={"container": "docker"}),
            "problem",
            "this container was started without GPUs",
        ),
        (
            change(gpu=unusable() | driver(denied_files=("/dev/nvidia0",))),
            "problem",
            "no permission to open /dev/nvidia0",
        ),
        (
            change(gpu=unusable(), software=environment(CUDA_VISIBLE_DEVICES="")),
            "problem",
            "CUDA_VISIBLE_DEVICES='' hides it",
        ),
        (
            change(gpu=unusable("CUDA unknown error")),
            "problem",
            "cannot use the GPU of this machine: CUDA unknown error",
        ),
    ],
    "driver_too_old": [
        (
            change(gpu=unusable() | driver(cuda="12.8")),
            "problem",
            "driver 580.65.06 is too old for PyTorch's CUDA 13.0",
        ),
        (change(gpu=unusable(OLD) | driver(version=None, cuda=None)), "problem", "NVIDIA driver is too old"),
    ],
    "unsupported_architecture": [
        (change(gpu=device(compute_capability="6.1")), "problem", "no kernels for H100 (compute capability 6.1)"),
        (
            change(gpu=torch(architectures=("sm_86", "sm_90"), devices=(TorchDevice("A100", GIB, "8.0"),))),
            "problem",
            "A100",
        ),
        (change(gpu=device(compute_capability="12.0")), "problem", "it has sm_80, sm_90"),
    ],
    "no_native_bf16": [(change(gpu=device(compute_capability="7.5")), "note", "computes no bf16")],
    "narrow_link": [
        (change(gpu=card(pcie_width=4)), "warning", "GPU 0 (H100) has 4 PCIe lanes of 16: weights stream at 25%")
    ],
    "slow_link": [
        (change(gpu=card(pcie_generation=3)), "warning", "runs at generation 3 of 5"),
        (change(gpu=card(pcie_generation=1, performance_state="P8")), "note", "(it is idle, at P8)"),
        (change(gpu=card(pcie_generation=1, performance_state=None)), "note", "runs at generation 1 of 5"),
    ],
    "other_processes": [
        (
            change(gpu=card(used_bytes=40 * GIB)),
            "warning",
            "others hold 42.95 GB of 85.90 GB on GPU 0 (H100): processes that",
        ),
        (
            change(gpu=card(used_bytes=40 * GIB, processes=(GpuProcess(7, "python", 39 * GIB),) * 5)),
            "warning",
            "python (pid 7), python (pid 7), python (pid 7) and 2 more",
        ),
        (
            change(gpu=card(used_bytes=None, processes=(GpuProcess(7),))),
            "note",
            "hold memory on GPU 0 (H100): process (pid 7)",
        ),
    ],
    "little_memory": [
        (
            change(memory={"free_bytes": 8_400_000_000}),
            "warning",
            "up to 0.7 billion parameters at 12 bytes each, 0.6 at 14",
        ),
        (
            change(memory={"free_bytes": 64 * GIB}, gpu=device(memory_bytes=80 * GIB)),
            "warning",
            "68.72 GB of host memory are free, less than the GPU's 85.90 GB",
        ),
    ],
    "cgroup_memory": [
        (change(memory={"cgroup_limit_bytes": 64 * GIB}), "warning", "may use 68.72 GB of the machine's 549.76 GB")
    ],
    "locked_memory": [(change(memory={"locked_limit": 65536}), "note", "locked memory is limited to 65.54 kB")],
    "wsl_locked_memory": [(change(system={"wsl": 2}), "warning", "at most half of the memory (274.88 GB)")],
    "numa": [
        (
            change(memory={"nodes": (NumaNode(0, free_bytes=10 * GIB), NumaNode(1, free_bytes=90 * GIB))}),
            "warning",
            "is on NUMA node 0 with 10.74 GB free; most free memory (96.64 GB) is on node 1",
        )
    ],
    "swap": [
        (change(memory={"swap_used_bytes": 5 * GIB}), "warning", "5.37 GB are swapped out"),
        (change(memory={"swap_used_bytes": 4096}), "note", "4.10 kB are swapped out"),
    ],
    "strict_overcommit": [
        (
            change(memory={"overcommit_mode": 2, "commit_limit_bytes": 256 * GIB, "committed_bytes": 6 * GIB}),
            "warning",
            "268.44 GB can be allocated, 536.87 GB are free",
        )
    ],
    "huge_pages": [
        (change(memory={"huge_pages": "never"}), "note", "transparent huge pages are 'never'"),
        (change(memory={"huge_pages": "madvise"}), "note", "transparent huge pages are 'madvise'"),
    ],
    "cpu_quota": [(change(cpu={"quota_cores": 2.5}), "warning", "may use 2.5 of 64 cores' time")],
    "saving_to_memory": [(change(storage={"filesystem": "tmpfs"}), "warning", "/work is in memory (tmpfs)")],
    "saving_over_network": [(change(storage={"filesystem": "nfs4"}), "note", "(nfs4)")],
    "little_disk": [
        (change(storage={"free_bytes": 10 * GIB}), "warning", "10.74 GB are free in /work; the largest model")
    ],
    "versions": [
        (change(software={"packages": {"torch": "2.9.1+cu126"}}), "problem", "torch 2.9.1+cu126 is older than 2.11"),
        (change(software={"packages": {"torch": None}}), "problem", "torch is not installed"),
    ],
    "musl": [(change(system={"libc": "musl"}), "warning", "the C library is musl")],
    "numba_cache": [(change(software={"numba_cache": None}), "warning", "numba can write to none of /a")],
    "open_files": [(change(system={"open_files_limit": 256}), "warning", "only 256 files")],
    "encoding": [(change(software={"encoding": "ANSI_X3.4-1968"}), "note", "encoding is ANSI_X3.4-1968")],
    "spinning_threads": [
        (SMALL, "note", "spin for a while on 2 cores"),
        (change(SMALL, software=environment(OMP_WAIT_POLICY="Active")), "warning", "OMP_WAIT_POLICY is Active"),
        (change(cpu={"quota_cores": 1.5}, software=environment()), "note", "on 1 cores"),
    ],
    "thread_count": [
        (change(software=environment(OMP_NUM_THREADS="1")), "warning", "use one of 64 cores"),
        (change(software=environment(OMP_NUM_THREADS="128,2")), "warning", "128, and 64 threads can run at once"),
    ],
}

# check: facts near its edge that it must not speak of; besides, none speaks of GOOD or of unknown facts
SILENT: dict[str, list[Facts]] = {
    "no_gpu": [
        change(gpu=unusable(OLD)),  # the driver has a finding of its own
        change(BARE, gpu=torch(devices=(), import_error="no")),
        change(BARE, gpu=torch(cuda=None, rocm="7.0")),
    ],
    "driver_too_old": [
        change(gpu=unusable() | driver(cuda="13.0") | torch(devices=(), cuda="13.2")),  # same major version: runs
        change(gpu=unusable() | driver(cuda=None)),
        change(gpu=driver(cuda="12.8")),  # it works, whatever the driver says
        change(gpu=CPU_BUILD | driver(cuda="11.4")),
    ],
    "unsupported_architecture": [
        change(gpu=device(compute_capability="8.6")),  # sm_80 runs there
        change(gpu=device(compute_capability=None)),
        change(gpu=torch(architectures=())),
        change(gpu=torch(architectures=("sm_90a",))),
    ],
    "no_native_bf16": [change(gpu=device(compute_capability="8.0")), change(gpu=device(compute_capability=None))],
    "narrow_link": [change(gpu=card(pcie_width=8, pcie_width_max=8)), change(gpu=card(pcie_width=None))],
    "slow_link": [change(gpu=card(pcie_generation=4, pcie_generation_max=4)), change(gpu=card(pcie_generation=None))],
    "other_processes": [change(gpu=card(used_bytes=None)), change(gpu=card(used_bytes=GIB // 2))],
    "little_memory": [change(memory={"free_bytes": 14_000_000_000})],
    "cgroup_memory": [change(memory={"cgroup_limit_bytes": 256 * GIB})],
    "locked_memory": [change(memory={"locked_limit": 512 * GIB}), change(BARE, memory={"locked_limit": 65536})],
    "wsl_locked_memory": [change(system={"wsl": 1}), change(BARE, system={"wsl": 2})],
    "numa": [
        change(memory={"nodes": (NumaNode(0, free_bytes=80 * GIB), NumaNode(1, free_bytes=90 * GIB))}),
        change(memory={"nodes": (NumaNode(0, free_bytes=90 * GIB), NumaNode(1, free_bytes=10 * GIB))}),
        change(memory={"nodes": (NumaNode(0), NumaNode(1, free_bytes=10 * GIB))}),
        change(gpu=card(numa_node=None)),
    ],
    "strict_overcommit": [
        change(memory={"overcommit_mode": 2, "commit_limit_bytes": 600 * GIB, "committed_bytes": 6 * GIB}),
        change(memory={"overcommit_mode": 1, "commit_limit_bytes": 6 * GIB}),
    ],
    "huge_pages": [
        change(BARE, memory={"huge_pages": "never"}),
        change(memory={"huge_pages": "never", "total_bytes": 32 * GIB}),
    ],
    "cpu_quota": [change(cpu={"quota_cores": 64.0}), change(cpu={"quota_cores": 2.0, "usable_cores": None})],
    "saving_to_memory": [change(storage={"filesystem": "nfs"})],
    "saving_over_network": [change(storage={"filesystem": "tmpfs"})],
    "little_disk": [change(storage={"free_bytes": 90 * GIB})],
    "versions": [
        change(software={"packages": {"torch": "2.11.0"}}),
        change(software={"required": {"torch": "2.13.0.0"}}),
        change(software={"packages": {"torch": "2.11"}, "required": {"torch": "2.11.0"}}),
    ],
    "open_files": [change(system={"open_files_limit": 1024}), change(system={"open_files_limit": "unlimited"})],
    "encoding": [change(software={"encoding": "utf8"})],
    "spinning_threads": [
        change(SMALL, software=environment(OMP_WAIT_POLICY="passive")),
        change(software=environment()),
        change(software=environment(OMP_WAIT_POLICY="ACTIVE")),
    ],
    "thread_count": [
        change(software=environment(OMP_NUM_THREADS="16")),
        change(software=environment(OMP_NUM_THREADS="many")),
        change(cpu={"usable_cores": 1}, software=environment(OMP_NUM_THREADS="1")),
    ],
}

BY_NAME = {check.__name__: check for check in CHECKS}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, case, id=f"{name}-{i}") for name, rows in table.items() for i, case in enumerate(rows)]


# -- findings -------------------------------------------------------------------------------------------------


def test_every_check_is_tried() -> None:
    assert set(TRIGGERS) == set(BY_NAME)
    assert set(SILENT) <= set(BY_NAME)


@pytest.mark.parametrize(("name", "case"), cases(TRIGGERS))
def test_a_check_speaks(name: str, case: tuple[Facts, str, str]) -> None:
    facts, level, text = case
    (finding,) = BY_NAME[name](facts)
    assert finding.level == level and text in finding.what and finding.remedy
    assert "\n" not in finding.what + finding.remedy
    assert finding in find(facts)


@pytest.mark.parametrize(("name", "case"), cases(SILENT))
def test_a_check_stays_silent(name: str, case: Facts) -> None:
    assert list(BY_NAME[name](case)) == []


def test_nothing_is_said_of_a_good_machine_nor_of_an_unknown_one() -> None:
    assert find(GOOD) == []
    assert find(Facts()) == []


def test_problems_come_first() -> None:
    facts = change(SMALL, system={"libc": "musl"}, software={"packages": {"torch": None}, **environment()})
    assert [finding.level for finding in find(facts)] == list(LEVELS)


def test_every_gpu_has_findings_of_its_own() -> None:
    facts = change(gpu={"gpus": (replace(GPU, pcie_width=8), replace(GPU, index=1, pcie_width=4), GPU)})
    assert [finding.what[:5] for finding in find(facts)] == ["GPU 0", "GPU 1"]


# -- the command ----------------------------------------------------------------------------------------------


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    """An empty root: no reader raises, and the report says `unknown`."""
    facts = Facts(
        system=host.read_system(tmp_path, {}),
        cpu=host.read_cpu(tmp_path),
        storage=host.read_storage(tmp_path, None),
        gpu=GpuFacts(),
    )
    assert facts.cpu == CpuFacts() and facts.storage == StorageFacts()
    text = report.as_text(facts, find(facts))
    assert "unknown; sockets unknown, cores unknown, SMT unknown, usable unknown" in text
    assert "nothing found" in text and "None" not in text


def test_text() -> None:
    findings = [Finding("warning", "a", "do b"), Finding("note", "c", "do d"), Finding("note", "e", "do f")]
    facts = change(
        memory={"swap_total_bytes": 0, "cgroup_limit_bytes": 64 * GIB},
        storage={"nvme": (Disk("nvme0n1", "990 PRO", 10**12),)},
        gpu=driver(nvidia_smi_error="no"),
        system={"wsl": 2, "container": "docker"},
    )
    lines = report.as_text(facts, findings).splitlines()
    assert lines[0].split(maxsplit=1) == ["system", "6.1.0 (x86_64), glibc 2.36, WSL 2, container (docker)"]
    said = ["warning: a", "         -> do b", "note:    c", "         -> do d", "note:    e", "         -> do f"]
    assert lines[-8:] == [*said, "", "1 warning, 2 notes"]
    for part in (
        "no swap",
        "numa node 1",
        "nvme0n1",
        "990 PRO, 1.00 TB",
        "PCIe generation 5 of 5 x16 of x16",
        "nvidia-smi: no",
    ):
        assert part in "\n".join(lines)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[Facts]:
    """The facts that the command finds: change the one element."""
    found = [GOOD]
    monkeypatch.setattr(report, "read_facts", lambda environment: found[0])
    return found


def test_exit_codes(machine: list[Facts], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    machine[0] = change(system={"libc": "musl"})
    assert cli.main(["doctor"]) == 0
    machine[0] = change(software={"packages": {}})
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 problem"


def test_json(machine: list[Facts], capsys: pytest.CaptureFixture[str]) -> None:
    machine[0] = change(BARE, software={"packages": {}})
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"facts", "findings"}
    assert found["facts"]["memory"]["nodes"][1]["cores"] == "32-63"
    assert [set(finding) for finding in found["findings"]] == [{"level", "what", "remedy"}] * 2
    assert [finding["level"] for finding in found["findings"]] == ["problem", "warning"]


def test_environment_is_the_one_that_the_command_was_started_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(report, "read_facts", lambda environment: seen.append(environment) or GOOD)
    assert cli.main(["doctor"]) == 0
    assert "OMP_WAIT_POLICY" not in seen[0]


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["memory"]["total_bytes"] > 0 and found["facts"]["gpu"]["torch"]["version"]


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--jsn"]) == 2
    assert capsys.readouterr().err.startswith("megatrain: unrecognized arguments: --jsn")
