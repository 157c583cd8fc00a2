"""What a release is made with agrees with what the package asks for and is tested with."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def pinned(file: str) -> dict[str, str]:
    """Package -> exact version of a requirements file, names as indexes compare them."""
    lines = (ROOT / file).read_text().splitlines()
    found = [re.match(r"([\w.-]+)==([^\s;]+)", line) for line in lines]
    return {re.sub(r"[-_.]+", "-", match[1]).lower(): match[2] for match in found if match}


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-extras.lock"])
def test_the_lock_has_every_dependency_as_tested_with_hashes(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(r"^EXTRAS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = found[1].split() if found and name == "requirements-extras.lock" else []
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    asked = {re.split(r"[<>=\[]", dependency)[0] for dependency in wanted}
    lock, constraints = pinned(name), pinned("constraints.txt")
    assert asked <= set(lock)
    assert {name: lock[name] for name in lock.keys() & constraints} == {
        n: constraints[n] for n in lock.keys() & constraints
    }
    entries = re.split(r"\n(?=\w)", (ROOT / name).read_text())[1:]
    assert len(entries) == len(lock) and all("--hash=sha256:" in entry for entry in entries)


def test_workflows_are_yaml_that_runs_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
        assert commands and all(re.fullmatch(r"make [\w-]+", command) for command in commands)
        assert {command.split()[1] for command in commands} <= targets


def test_what_needs_the_network_is_no_part_of_the_tests() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("test", "check", "install-dev"):
        needs = re.search(rf"^{target}:(.*)$", makefile, re.MULTILINE)
        assert needs and not {"lock", "audit-dependencies", "sbom"} & set(needs[1].split())
