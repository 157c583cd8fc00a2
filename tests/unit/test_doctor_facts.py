"""The facts that `megatrain doctor` reads, from made-up /proc and /sys trees, nvidia-smi and PyTorch."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatrain.doctor import gpus, host, read, software, torch_probe
from megatrain.doctor.facts import (
    CpuFacts,
    Disk,
    DriverFacts,
    Gpu,
    GpuFacts,
    GpuProcess,
    NumaNode,
    TorchDevice,
    TorchFacts,
    release,
)
from megatrain.doctor.files import count_in_list, list_folder

GIB = 1024**3


# -- files ----------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_numbers_in_lists_and_names(tmp_path: Path) -> None:
    assert [count_in_list(text) for text in ("0", "0-3,8", "4-7,9,12-13", "", "x", None)] == [1, 5, 7, None, None, None]
    write(tmp_path, {"node10/x": "", "node2/x": "", "online": ""})
    assert [path.name for path in list_folder(tmp_path, r"node\d+")] == ["node2", "node10"]
    assert list_folder(tmp_path / "missing") == []


def test_releases() -> None:
    assert [release(text) for text in ("2.11.0rc1+cu130", "9.0", "git", None)] == [(2, 11, 0), (9, 0), (), ()]


# -- system, processor, memory, disks -------------------------------------------------------------------------


def test_system(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/sys/kernel/osrelease": "5.15.90.1-microsoft-standard-WSL2\n",
            "proc/self/oom_score": "666\n",
            "proc/self/oom_score_adj": "-17\n",
            "proc/self/limits": (
                "Limit                     Soft Limit           Hard Limit           Units     \n"
                "Max open files            1024                 1048576              files     \n"
                "Max locked memory         unlimited            unlimited            bytes     \n"
            ),
        },
    )
    found = host.read_system(tmp_path, {})
    assert (found.kernel, found.wsl) == ("5.15.90.1-microsoft-standard-WSL2", 2)
    assert (found.oom_score, found.oom_score_adj, found.open_files_limit) == (666, -17, 1024)
    assert found.container is None
    assert host.read_memory(tmp_path).locked_limit == "unlimited"


@pytest.mark.parametrize(
    ("kernel", "version"), [("4.4.0-19041-Microsoft", 1), ("4.19.84-microsoft-standard", 2), ("6.1.0-amd64", None)]
)
def test_wsl(kernel: str, version: int | None, tmp_path: Path) -> None:
    write(tmp_path, {"proc/sys/kernel/osrelease": kernel})
    assert host.read_system(tmp_path, {}).wsl == version


@pytest.mark.parametrize(
    ("files", "variables", "name"),
    [
        ({".dockerenv": ""}, {}, "docker"),
        ({"run/.containerenv": ""}, {}, "podman"),
        ({".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({}, {"APPTAINER_CONTAINER": "/image.sif"}, "apptainer"),
        ({}, {"container": "lxc"}, "lxc"),
        ({"proc/1/cgroup": "4:memory:/kubepods/pod1\n"}, {}, "kubepods"),
        ({"proc/1/cgroup": "0::/init.scope\n"}, {}, None),
    ],
)
def test_container(files: dict[str, str], variables: dict[str, str], name: str | None, tmp_path: Path) -> None:
    assert host.read_system(write(tmp_path, files), variables).container == name


def test_libc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "confstr", lambda name: "glibc 2.36")
    assert host.read_system(tmp_path, {}).libc == "glibc 2.36"

    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(host.os, "confstr", unknown)
    assert host.read_system(tmp_path, {}).libc is None
    assert host.read_system(write(tmp_path, {"lib/ld-musl-x86_64.so.1": ""}), {}).libc == "musl"


def test_processor(tmp_path: Path) -> None:
    """Two sockets of two cores with two threads each; the third file is not of a processor."""
    one = "processor\t: {}\nmodel name\t: Xeon Gold\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16\n\n"
    files = {
        "proc/cpuinfo": "".join(one.format(n) for n in range(8)),
        "proc/self/status": "Name:\tpython\nCpus_allowed:\t3f\nCpus_allowed_list:\t0-4,7\n",
        "sys/devices/system/cpu/cpufreq/topology/thread_siblings_list": "none",
    }
    for cpu in range(8):
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = f"{cpu % 4},{cpu % 4 + 4}\n"
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"] = f"{cpu % 4 // 2}\n"
    found = host.read_cpu(write(tmp_path, files))
    sets = ("AVX2", "AVX-512", "AVX512-BF16", "AMX", "AMX-BF16")
    assert found == CpuFacts("Xeon Gold", 2, 4, 8, 6, None, sets)
    assert found.threads == 6 and replace(found, quota_cores=2.5).threads == 2


def test_processor_of_arm(tmp_path: Path) -> None:
    write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU part\t: 0xd4f\n"})
    found = host.read_cpu(tmp_path)
    assert (found.name, found.logical_cores, found.instruction_sets) == (None, 1, ("NEON", "SVE", "BF16"))


def test_quota_v2_is_the_tightest_of_all_groups(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        },
    )
    assert host.read_cpu(tmp_path).quota_cores == 2.5
    write(tmp_path, {"sys/fs/cgroup/job/cpu.max": "max 100000\n"})
    assert host.read_cpu(tmp_path).quota_cores is None


def test_quota_v1(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/cpu/box/"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/other\n3:cpu,cpuacct:/box\n0::/\n",
            base + "cpu.cfs_quota_us": "400000\n",
            base + "cpu.cfs_period_us": "100000\n",
        },
    )
    assert host.read_cpu(tmp_path).quota_cores == 4
    write(tmp_path, {base + "cpu.cfs_quota_us": "-1\n"})
    assert host.read_cpu(tmp_path).quota_cores is None


def test_memory(tmp_path: Path) -> None:
    meminfo = {"MemTotal": 1000, "MemAvailable": 700, "SwapTotal": 50, "SwapFree": 20, "CommitLimit": 550}
    node = "Node 1 MemTotal: 600 kB\nNode 1 MemFree: 100 kB\nNode 1 Active(file): 30 kB\nNode 1 HugePages_Total: 7\n"
    write(
        tmp_path,
        {
            "proc/meminfo": "".join(f"{name}: {number} kB\n" for name, number in meminfo.items()),
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(400 * 1024),
            "sys/fs/cgroup/memory.current": str(100 * 1024),
            "proc/self/limits": "Max locked memory         8388608              8388608              bytes     \n",
            "proc/sys/vm/overcommit_memory": "2\n",
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
            "sys/devices/system/node/node1/meminfo": node,
            "sys/devices/system/node/node1/cpulist": "4-7\n",
            "sys/devices/system/node/node0/cpulist": "\n",
        },
    )
    found = host.read_memory(tmp_path)
    assert (found.total_bytes, found.available_bytes, found.free_bytes) == (1000 * 1024, 700 * 1024, 300 * 1024)
    assert (found.cgroup_limit_bytes, found.cgroup_used_bytes) == (400 * 1024, 100 * 1024)
    assert found.nodes == (NumaNode(0), NumaNode(1, 600 * 1024, 130 * 1024, "4-7"))
    assert (found.swap_total_bytes, found.swap_used_bytes) == (50 * 1024, 30 * 1024)
    assert (found.locked_limit, found.huge_pages, found.overcommit_mode) == (8388608, "madvise", 2)
    assert (found.commit_limit_bytes, found.committed_bytes) == (550 * 1024, None)


def test_storage(tmp_path: Path) -> None:
    place = tmp_path / "with space" / "run"
    place.mkdir(parents=True)
    inner = str(tmp_path / "with space").replace(" ", r"\040")
    write(
        tmp_path,
        {
            "proc/self/mountinfo": (
                "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
                f"30 27 0:1 / {inner} rw shared:5 - ext4 /dev/vdb rw\n"
                f"31 30 0:2 / {inner} rw - tmpfs none rw\n"
                f"32 27 0:3 / {inner}er rw - nfs4 host:/x rw\n"
                "broken\n"
            ),
            "sys/block/nvme0n1/size": "2000\n",
            "sys/block/nvme0n1/device/model": "Samsung SSD 990 PRO  \n",
            "sys/block/nvme0c0n1/size": "2000\n",
            "sys/block/vda/size": "9\n",
        },
    )
    found = host.read_storage(tmp_path, str(place))
    assert found.filesystem == "tmpfs" and found.nvme == (Disk("nvme0n1", "Samsung SSD 990 PRO", 1024000),)
    assert found.free_bytes is not None and found.total_bytes is not None and 0 < found.free_bytes <= found.total_bytes
    assert host.read_storage(tmp_path, "/nowhere/at/all").filesystem == "ext4"
    assert host.read_storage(tmp_path, "/nowhere/at/all").free_bytes is None
    assert host.read_storage(tmp_path, None).folder is None


# -- GPUs -----------------------------------------------------------------------------------------------------

SMI = {
    "index": "0",
    "uuid": "GPU-1",
    "name": "NVIDIA H100 PCIe",
    "pci.bus_id": "00000000:3B:00.0",
    "driver_version": "580.65.06",
    "memory.total": "81559",
    "memory.used": "1024",
    "compute_cap": "9.0",
    "pcie.link.gen.current": "4",
    "pcie.link.gen.max": "5",
    "pcie.link.width.current": "8",
    "pcie.link.width.max": "16",
    "pstate": "P0",
    "persistence_mode": "Disabled",
    "power.limit": "310.00",
    "power.default_limit": "350.00",
}
PROCESS = {"gpu_uuid": "GPU-1", "pid": "4711", "used_memory": "[N/A]", "process_name": "python, with a comma"}


def smi(rows: list[dict[str, str]], known: Sequence[str] = tuple(SMI)) -> gpus.Run:
    """An nvidia-smi with these GPUs that knows these fields; its one process runs on GPU-1."""

    def run(command: Sequence[str]) -> tuple[int, str] | None:
        what, _, names = command[1].partition("=")
        fields = names.split(",")
        if what == "--query-compute-apps":
            return 0, ", ".join(PROCESS[field] for field in fields) + "\n"
        for field in fields:
            if field not in known:
                return 2, f'Field "{field}" is not a valid field to query.\n\n'
        return 0, "".join(", ".join(row[field] for field in fields) + "\n" for row in rows)

    return run


def no_smi(command: Sequence[str]) -> None:
    return None


def read_gpus(root: Path, run: Any, cuda: str | None = None) -> GpuFacts:
    """Without PyTorch: `no_smi` runs no Python either."""
    return gpus.read_gpus(root, run, no_smi, lambda: cuda)


def test_gpu_from_nvidia_smi(tmp_path: Path) -> None:
    write(tmp_path, {"sys/bus/pci/devices/0000:3b:00.0/numa_node": "1\n"})
    found = read_gpus(tmp_path, smi([SMI, SMI | {"index": "3", "uuid": "GPU-2"}]), "13.0")
    assert found.gpus[0] == Gpu(
        index=0,
        name="NVIDIA H100 PCIe",
        pci_address="0000:3b:00.0",
        numa_node=1,
        memory_bytes=81559 * 1024**2,
        used_bytes=GIB,
        compute_capability="9.0",
        native_bf16=True,
        pcie_generation=4,
        pcie_generation_max=5,
        pcie_width=8,
        pcie_width_max=16,
        performance_state="P0",
        persistence_mode=False,
        power_limit_watts=310.0,
        power_default_watts=350.0,
        processes=(GpuProcess(4711, "python, with a comma", None),),
    )
    assert (found.gpus[1].index, found.gpus[1].processes) == (3, ())
    assert (found.driver.version, found.driver.cuda, found.hardware) == ("580.65.06", "13.0", True)


def test_old_nvidia_smi_and_values_that_it_does_not_have(tmp_path: Path) -> None:
    row = SMI | {"memory.used": "[N/A]", "power.limit": "[Not Supported]", "pstate": "[Unknown Error]", "name": "N/A"}
    known = [field for field in SMI if field not in ("compute_cap", "persistence_mode")]
    (found,) = read_gpus(tmp_path, smi([row], known)).gpus
    assert (found.compute_capability, found.native_bf16, found.persistence_mode) == (None, None, None)
    assert (found.used_bytes, found.power_limit_watts, found.performance_state, found.name) == (None, None, None, None)
    assert (found.memory_bytes, found.power_default_watts) == (81559 * 1024**2, 350.0)


def test_gpu_without_nvidia_smi(tmp_path: Path) -> None:
    base = "sys/bus/pci/devices/0000:41:00.0/"
    write(
        tmp_path,
        {
            base + "vendor": "0x10de\n",
            base + "class": "0x030200\n",
            base + "numa_node": "-1\n",
            base + "current_link_speed": "16.0 GT/s PCIe\n",
            base + "max_link_speed": "32.0 GT/s PCIe\n",
            base + "current_link_width": "16\n",
            base + "max_link_width": "255\n",
            "sys/bus/pci/devices/0000:41:00.1/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:41:00.1/class": "0x040300\n",  # its sound
            "sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n",
            "sys/bus/pci/devices/0000:00:02.0/class": "0x030000\n",
        },
    )
    found = read_gpus(tmp_path, no_smi)
    link: dict[str, Any] = {"pcie_generation": 4, "pcie_generation_max": 5, "pcie_width": 16}
    assert found.gpus == (Gpu(0, pci_address="0000:41:00.0", **link),)
    assert found.driver == DriverFacts()


def test_driver_without_gpus(tmp_path: Path) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.07  Release Build\nGCC version: 12\n"
    write(tmp_path, {"proc/driver/nvidia/version": version, "dev/nvidia0": "", "dev/nvidiactl": "", "dev/null": ""})
    run = lambda command: (9, "NVIDIA-SMI has failed because it could not talk to the driver.\nMore.\n")  # noqa: E731
    found = read_gpus(tmp_path, run).driver
    assert (found.version, found.loaded, found.device_files) == ("570.133.07", True, (str(tmp_path / "dev/nvidia0"),))
    assert found.nvidia_smi_error == "NVIDIA-SMI has failed because it could not talk to the driver."


def test_device_files_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": ""})
    monkeypatch.setattr(gpus.os, "access", lambda path, mode: path.endswith("1"))
    assert read_gpus(tmp_path, no_smi).driver.denied_files == (str(tmp_path / "dev/nvidia0"),)


def test_commands_that_do_not_exist_or_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.run_command([sys.executable, "-c", "print(1); exit(3)"]) == (3, "1\n")
    assert gpus.run_command(["/nowhere/nvidia-smi"]) is None

    def hang(*args: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(gpus.subprocess, "run", hang)
    assert gpus.run_command(["nvidia-smi"]) == (124, "nvidia-smi did not answer within 20 s")


@pytest.mark.parametrize(
    ("code", "number", "text"), [(0, 12080, "12.8"), (0, 13000, "13.0"), (0, 0, None), (3, 0, None)]
)
def test_newest_cuda_of_the_driver(code: int, number: int, text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(pointer: Any) -> int:
        pointer._obj.value = number
        return code

    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=answer))
    assert gpus.newest_driver_cuda() == text


def test_no_driver_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpus.ctypes, "CDLL", missing)
    assert gpus.newest_driver_cuda() is None


# -- PyTorch --------------------------------------------------------------------------------------------------


def fake_torch(init: Callable[[], None], count: int = 1, cuda: str | None = "13.0") -> SimpleNamespace:
    card = SimpleNamespace(name="H100", total_memory=80 * GIB, major=9, minor=0)
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda, hip=None),
        cuda=SimpleNamespace(
            init=init,
            device_count=lambda: count,
            get_device_properties=lambda index: card,
            get_arch_list=lambda: ["sm_80", "sm_90"],
        ),
    )


def fail() -> None:
    raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")


@pytest.mark.parametrize(
    ("module", "devices", "reason"),
    [
        (fake_torch(lambda: None), (TorchDevice("H100", 80 * GIB, "9.0"),), None),
        (fake_torch(lambda: None, count=0), (), "it counts no devices"),
        (fake_torch(fail), (), "Found no NVIDIA driver on your system."),
    ],
)
def test_torch(
    module: Any, devices: tuple[TorchDevice, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", module)
    found = torch_probe.read_torch()
    assert found == TorchFacts("2.13.0", None, "13.0", None, ("sm_80", "sm_90"), devices, reason)


def test_torch_for_the_cpu_is_not_asked_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(fail, cuda=None))
    assert torch_probe.read_torch() == TorchFacts("2.13.0", unusable_because="it is built for the CPU alone")


def test_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch" in (torch_probe.read_torch().import_error or "")


FOUND = TorchFacts("2.13.0", cuda="13.0", architectures=("sm_90",), devices=(TorchDevice("H100", 80 * GIB, "9.0"),))


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        ((0, "a warning\n" + json.dumps(asdict(FOUND)) + "\n"), FOUND),
        ((0, "[1]\n"), TorchFacts(import_error="[1]")),
        (
            (-6, "Intel oneMKL FATAL ERROR: Cannot load\n"),
            TorchFacts(import_error="Intel oneMKL FATAL ERROR: Cannot load"),
        ),
        ((-4, ""), TorchFacts(import_error="its process ended with exit code -4")),
        ((124, "python did not answer within 120 s"), TorchFacts(import_error="python did not answer within 120 s")),
        (None, TorchFacts(import_error="cannot start Python")),
    ],
)
def test_torch_in_a_process_of_its_own(answer: tuple[int, str] | None, facts: TorchFacts) -> None:
    assert gpus.ask_torch(lambda command: answer) == facts


# -- software -------------------------------------------------------------------------------------------------


def test_versions_and_what_megatrain_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.11", "pyyaml (>=6.0)", "numpy<3,>=2.0", 'pytest>=9.0; extra == "dev"', "rich"]
    monkeypatch.setattr(software.metadata, "requires", lambda name: lines)

    def version(name: str) -> str:
        if name != "torch":
            raise software.metadata.PackageNotFoundError(name)
        return "2.13.0"

    monkeypatch.setattr(software.metadata, "version", version)
    found = software.read_software({})
    assert found.required == {"torch": "2.11", "pyyaml": "6.0"}
    assert found.packages["torch"] == "2.13.0" and found.packages["flash-attn"] is None and "pyyaml" in found.packages


def test_requirements_are_those_of_pyproject() -> None:
    found = software.read_software({})
    assert {"torch", "transformers", "numba"} <= set(found.required) and "pytest" not in found.required
    assert found.packages["torch"] is not None


def test_environment_shows_no_secrets() -> None:
    variables = {"OMP_NUM_THREADS": "4", "HF_TOKEN": "secret", "CUDA_VISIBLE_DEVICES": "0", "HOME": "/h"}
    found = software.read_software(variables).environment
    assert found == {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "4"}


def test_numba_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, home = tmp_path / "package", tmp_path / "home"
    (package / "optim").mkdir(parents=True)
    home.mkdir()
    chosen = {"HOME": str(home), "NUMBA_CACHE_DIR": str(tmp_path / "own")}
    places = [str(tmp_path / "own"), str(package / "optim/__pycache__"), str(home / ".cache/numba")]
    found = software.read_software(chosen, package)
    assert (list(found.numba_cache_folders), found.numba_cache) == (places, places[0])
    assert not (tmp_path / "own").exists()  # looking makes nothing

    (tmp_path / "own").write_text("a file")
    (package / "optim/__pycache__").write_text("a file")
    assert software.read_software(chosen, package).numba_cache == places[2]

    def refuse(dir: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(software.tempfile, "TemporaryFile", refuse)
    assert software.read_software(chosen, package).numba_cache is None


def test_numba_looks_where_we_look() -> None:
    """Against numba's own choice for one of the kernels."""
    from megatrain.optim import adamw_kernels, split_master

    kernels = [made for made in vars(split_master).values() if hasattr(made, "_cache")]
    kernels += [made for made in vars(adamw_kernels).values() if hasattr(made, "_cache")]
    used = {kernel._cache._impl.locator.get_cache_path() for kernel in kernels if hasattr(kernel._cache, "_impl")}
    folder = software.read_software(dict(software.os.environ)).numba_cache
    assert used and folder is not None and all(Path(path).is_relative_to(folder) for path in used)


# -- what cannot be read ----------------------------------------------------------------------------------------


def test_unreadable_files(tmp_path: Path) -> None:
    """Folders where files belong, and bytes that are no text."""
    for name in ("proc/self/status", "proc/self/mountinfo", "proc/self/limits", "proc/driver/nvidia/version"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_bytes(b"processor\t: 0\nmodel name\t: \xff\xfe\n")
    (tmp_path / "dev").write_text("")
    assert host.read_cpu(tmp_path).logical_cores == 1
    assert host.read_storage(tmp_path, str(tmp_path)).filesystem is None
    assert host.read_system(tmp_path, {}).open_files_limit is None


def test_working_directory_that_was_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(read.os, "getcwd", gone)
    assert read._working_directory() is None
