"""The Dockerfile, as far as it can be judged without an engine that builds it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """(word, what follows), lines that go on joined, without comments."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    split = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in split]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def test_every_line_is_an_instruction() -> None:
    known = {"FROM", "SHELL", "RUN", "ENV", "COPY", "VOLUME", "USER", "WORKDIR", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} == known


def test_the_base_is_named_exactly_with_the_cuda_of_the_lock() -> None:
    (base,) = of("FROM")
    version = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu24\.04", base)
    runtime = re.search(
        r"^nvidia-cuda-runtime==(\d+\.\d+)\.", (ROOT / "requirements-extras.lock").read_text(), re.MULTILINE
    )
    assert version is not None and runtime is not None and version[1] == runtime[1]
    assert "latest" not in " ".join(rest for _, rest in instructions())


def test_what_runs_is_not_root() -> None:
    words = [word for word, _ in instructions()]
    (user,) = of("USER")
    assert int(user) > 0 and words.index("USER") > max(n for n, word in enumerate(words) if word == "RUN")
    assert f"--uid {user}" in TEXT


def test_dependencies_come_by_hash_and_the_package_without_any() -> None:
    installs = [rest for rest in of("RUN") if "pip install" in rest]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0] and "requirements-extras.lock" in installs[0]
    assert "--no-deps --no-build-isolation" in installs[1]


def test_what_is_copied_is_there_and_all_that_gets_into_the_build() -> None:
    copied = {source for rest in of("COPY") for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in rules and {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_it_is_said_that_it_was_not_built() -> None:
    page = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    assert "Not built yet where this was written" in TEXT and "not built yet where it was written" in page
