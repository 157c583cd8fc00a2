"""Imports flow one way, and the core needs little more than torch, numpy and numba."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatrain

ROOT = Path(megatrain.__file__).parent

# Who may import whom, lowest first: a package only ever names packages above its own line. Imports inside functions
# count too. Names below `megatrain`; a package stands for all of its modules.
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "recipes": set(),
    "errors": set(),
    "sizes": set(),
    "threads": set(),
    "hub": set(),
    "files": set(),
    "private_files": set(),
    "regular_file": set(),
    "arguments": {"errors"},
    "yaml_file": {"errors"},
    "config_kinds": {"errors", "sizes"},
    "config": {"errors", "sizes", "yaml_file", "config_kinds"},
    "losses": {"errors"},
    "schedule": set(),
    "model": {"errors", "sizes", "threads", "hub", "files", "regular_file"},
    "optim": {"errors", "sizes", "threads", "model.partition"},
    "memory": {"errors", "sizes", "threads", "model.partition", "optim"},
    "doctor": {"version", "sizes", "memory.limits"},
    "trust": {"version", "errors", "sizes", "files", "private_files", "doctor"},
    "checkpoint": {"errors", "sizes", "threads", "files", "model", "optim", "memory", "trust"},
    "device": {"errors", "sizes", "memory"},
    "engine": {
        *("errors", "sizes", "threads", "files", "schedule", "model", "optim", "memory", "device", "checkpoint"),
        *("trust", "losses"),
    },
    "trainers": {"errors", "files", "device", "engine", "checkpoint"},
    "planner": {
        *("errors", "sizes", "yaml_file", "config_kinds", "schedule"),
        *("model", "optim", "memory", "device", "engine"),
    },
    "data": {"errors", "sizes", "hub", "files", "private_files", "model.loading", "model.weight_files"},
    "report": {
        *("version", "errors", "sizes", "private_files", "yaml_file", "config"),
        *("device.trace", "planner.hardware", "planner.placement", "checkpoint.folders", "trust"),
    },
    "train": {
        *("errors", "sizes", "files", "private_files", "arguments", "yaml_file", "config", "config_kinds"),
        *("data", "model", "optim", "memory", "device", "engine", "planner", "checkpoint", "trust", "losses", "report"),
    },
    "cli": {"version", "errors", "sizes", "arguments", "config", "config_kinds", "train", "doctor", "trust", "report"},
    "__main__": {"cli"},
    # the package itself: its public names
    "": {"version", "errors", "losses", "engine.engine", "optim.adamw", "trainers.mixin"},
}

CORE = {"torch", "numpy", "numba"}
# beyond the core: llvmlite is numba's own, psutil reads memory where there is no /proc
ALSO_CORE = {
    "optim.adamw_kernels": {"llvmlite"},
    "optim.adamw_vector": {"llvmlite"},
    "memory.limits": {"psutil"},
    "model.folder_swap": {"psutil"},
    "model.kernels": {"liger_kernel"},  # where it is installed
    "model.fused_loss": {"liger_kernel"},
}
READS_AND_WRITES_CHECKPOINTS = {
    *("engine.checkpoints", "model.loading", "model.weight_files", "model.saving", "model.saved_weights"),
}


def modules() -> dict[str, Path]:
    """Dotted names below `megatrain`; '' is the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Absolute names of everything that a module imports, wherever in it."""
    path = MODULES[name]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from megatrain.engine import setup` names a module, `from megatrain.errors import X` does not
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("megatrain.") in MODULES else str(node.module)


def package_of(name: str) -> str:
    return name.split(".")[0]


def test_every_package_has_its_place() -> None:
    assert {package_of(name) for name in MODULES} == set(MAY_IMPORT)


def test_places_are_in_order() -> None:
    """No cycle: everything allowed was named on an earlier line."""
    order = list(MAY_IMPORT)
    for place, allowed in MAY_IMPORT.items():
        assert all(order.index(package_of(other)) < order.index(place) for other in allowed), place


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_only_what_lies_below_it(name: str) -> None:
    package = package_of(name)
    allowed = MAY_IMPORT[package]
    for imported in imports(name):
        if package_of(imported) != "megatrain":
            continue
        other = imported.removeprefix("megatrain").lstrip(".")
        inside = bool(package) and package_of(other) == package
        prefixes = {other, package_of(other), ".".join(other.split(".")[:2])}
        assert inside or prefixes & allowed, f"{name or 'megatrain'} imports {imported}"


def test_modules_of_one_package_do_not_import_each_other_in_circles() -> None:
    """At import time; a type-checking or in-function import may point back."""
    edges = {}
    for name, path in MODULES.items():
        top = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
        named = {str(n.module).removeprefix("megatrain.") for n in top}
        named |= {f"{n.module}.{a.name}".removeprefix("megatrain.") for n in top for a in n.names}
        edges[name] = {other for other in named if other in MODULES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in edges:
        visit(name, ())


@pytest.mark.parametrize(
    "name", [n for n in MODULES if package_of(n) in ("memory", "optim", "model", "device", "engine")]
)
def test_core_imports_only_torch_numpy_and_numba(name: str) -> None:
    if name in READS_AND_WRITES_CHECKPOINTS:
        return
    allowed = CORE | ALSO_CORE.get(name, set()) | {"megatrain"} | set(sys.stdlib_module_names)
    foreign = sorted({imported for imported in imports(name) if package_of(imported) not in allowed})
    assert foreign == []


def test_asking_for_the_version_needs_no_torch() -> None:
    """Walks what is imported at module level from the command line's entry on."""
    seen, waiting = set(), ["", "cli", "__main__"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for imported in names:
                assert package_of(imported) not in ("torch", "numba", "transformers"), f"{name}: {imported}"
                if package_of(imported) == "megatrain":
                    waiting.append(imported.removeprefix("megatrain").lstrip("."))
