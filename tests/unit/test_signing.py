"""Signing a folder and checking it: with this library's own command and with other programs that know the format."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from saved_folders import FILES, fill, make_checkpoint, make_run

from megatrain import cli
from megatrain.trust import signing

Output = pytest.CaptureFixture[str]
WEIGHTS = "model/model.safetensors"


class Keys:
    """A pair of key files."""

    def __init__(self, folder: Path, name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
        self.private, self.public = str(folder / f"{name}.pem"), str(folder / f"{name}.pub")
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        Path(self.private).write_bytes(private)
        Path(self.public).write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def keys(key_folder: Path) -> Keys:
    return Keys(key_folder, "ours", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture(scope="module")
def other_keys(key_folder: Path) -> Keys:
    return Keys(key_folder, "theirs", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def signed(tmp_path: Path, keys: Keys, capsys: Output) -> Path:
    folder = make_checkpoint(tmp_path / "step-000100")
    assert cli.main(["sign", str(folder), "--private-key", keys.private]) == cli.DONE
    assert capsys.readouterr().out == f"wrote {folder / 'model.sig'}\n"
    return folder


def verify(folder: Path, keys: Keys, *more: str) -> int:
    return cli.main(["verify", str(folder), "--public-key", keys.public, *more])


def payload_of(signature: Path) -> dict:
    return json.loads(base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"]))


def test_a_signed_checkpoint(signed: Path, keys: Keys, capsys: Output) -> None:
    assert verify(signed, keys) == cli.DONE
    line, result = capsys.readouterr().out.splitlines()
    assert line == f"signature: {signed}/model.sig was made with the private key of {keys.public} and covers every file"
    assert result.startswith("all as recorded: checked 4 files")
    assert cli.main(["verify", str(signed)]) == cli.DONE  # the signature is no file too many
    names = [resource["name"] for resource in payload_of(signed / "model.sig")["predicate"]["resources"]]
    assert sorted(names) == sorted([*FILES, "manifest.json"])


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_other_curves(curve: ec.EllipticCurve, tmp_path: Path, capsys: Output) -> None:
    pair, folder = Keys(tmp_path, "key", ec.generate_private_key(curve)), fill(tmp_path / "model", FILES)
    assert cli.main(["sign", str(folder), "--private-key", pair.private]) == cli.DONE
    assert verify(folder, pair) == cli.DONE


def test_a_plain_model_folder_with_the_signature_elsewhere(tmp_path: Path, keys: Keys, capsys: Output) -> None:
    folder, signature = fill(tmp_path / "model", FILES), tmp_path / "model.sig"
    assert cli.main(["sign", str(folder), "--private-key", keys.private, "--signature", str(signature)]) == cli.DONE
    assert signature.is_file() and not (folder / "model.sig").exists()
    assert verify(folder, keys, "--signature", str(signature)) == cli.DONE
    assert "all as recorded" in capsys.readouterr().out
    assert verify(folder, keys) == cli.WRONG
    assert "there is no signature" in capsys.readouterr().err
    (folder / WEIGHTS).write_bytes(b"other")
    assert verify(folder, keys, "--signature", str(signature)) == cli.FAILED


def test_a_whole_run(tmp_path: Path, keys: Keys, capsys: Output) -> None:
    run = make_run(tmp_path / "run")
    assert cli.main(["sign", str(run), "--private-key", keys.private]) == cli.DONE
    assert verify(run, keys) == cli.DONE
    (run / "metrics.jsonl").write_text("added\n")
    assert cli.main(["verify", str(run)]) == cli.DONE  # no checkpoint has changed
    assert verify(run, keys) == cli.FAILED
    assert "metrics.jsonl: expected no file (by the signature), found 6 bytes" in capsys.readouterr().out


def model_signing(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_formats_own_program_verifies_what_is_signed_here(signed: Path, keys: Keys) -> None:
    arguments = ("verify", "key", str(signed), "--signature", str(signed / "model.sig"), "--public_key", keys.public)
    done = model_signing(*arguments)
    assert done.returncode == 0, done.stderr
    (signed / "training.json").write_bytes(b"{}")
    assert model_signing(*arguments).returncode == 1


def test_what_the_formats_own_program_signs_is_verified_here(tmp_path: Path, keys: Keys, capsys: Output) -> None:
    folder = fill(tmp_path / "model", {**FILES, ".git/config": b"[core]\n"})
    signature = str(folder / "model.sig")
    done = model_signing("sign", "key", str(folder), "--signature", signature, "--private_key", keys.private)
    assert done.returncode == 0, done.stderr
    assert verify(folder, keys) == cli.DONE
    (folder / ".git" / "hook").write_bytes(b"it signs nothing in there, and says so in the signature")
    assert verify(folder, keys) == cli.DONE
    capsys.readouterr()
    (folder / "extra").write_bytes(b"x")
    assert verify(folder, keys) == cli.FAILED
    (line, _) = capsys.readouterr().out.splitlines()
    assert line == "extra: expected no file (by the signature), found 1 bytes"


def rewrite_payload(signature: Path, change: Callable[[dict], object]) -> None:
    bundle, payload = json.loads(signature.read_text()), payload_of(signature)
    change(payload)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    signature.write_text(json.dumps(bundle))


def drop_weights(payload: dict) -> None:
    resources = payload["predicate"]["resources"]
    payload["predicate"]["resources"] = [one for one in resources if one["name"] != WEIGHTS]


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed file": (lambda f: (f / WEIGHTS).write_bytes(bytes(5120)), f"{WEIGHTS}: expected sha256 "),
    "a shorter file": (lambda f: os.truncate(f / WEIGHTS, 5), f"{WEIGHTS}: expected sha256 "),
    "a missing file": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: expected sha256 "),
    "an extra file": (lambda f: (f / "x.py").write_bytes(b"1"), "x.py: expected no file (by the"),
    "an extra file of git": (lambda f: fill(f, {".git/hooks/x": b"1"}), ".git/hooks/x: expected no file (by the"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: expected sha256 "),
    "an edited manifest": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace("100", "101")),
        "manifest.json: expected sha256 ",
    ),
    "a link": (lambda f: (f / "x").symlink_to("training.json"), "x: expected a regular file, found a link"),
    "a link out": (lambda f: (f / "x").symlink_to("/etc/hostname"), "x: expected a regular file, found a link that"),
    "an edited signature": (
        lambda f: rewrite_payload(f / "model.sig", drop_weights),
        "found one with another key, or one that was changed",
    ),
    "half a signature": (lambda f: os.truncate(f / "model.sig", 300), "model.sig: expected a signature, found what is"),
    "an empty signature": (lambda f: os.truncate(f / "model.sig", 0), "model.sig: expected a signature, found what is"),
    "another file": (lambda f: (f / "model.sig").write_text("[]"), "model.sig: expected a signature, found what is"),
    "no envelope": (
        lambda f: (f / "model.sig").write_text(json.dumps({"verificationMaterial": {}, "mediaType": "x"})),
        "model.sig: expected a signature, found what is",
    ),
    "bytes": (lambda f: (f / "model.sig").write_bytes(b"\xff\xfe"), "model.sig: expected a signature, found what is"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_each_tampering_is_a_line_and_exit_1(name: str, signed: Path, keys: Keys, capsys: Output) -> None:
    tamper, line = TAMPERING[name]
    tamper(signed)
    assert verify(signed, keys) == cli.FAILED
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and any(line in one for one in lines)
    assert not any(one.startswith("signature: ") for one in lines)
    assert "difference" in lines[-1]


def test_a_file_changed_with_its_manifest_is_told_by_the_signature_alone(
    signed: Path, keys: Keys, capsys: Output
) -> None:
    from megatrain.trust.manifest import write_manifest

    (signed / WEIGHTS).write_bytes(b"other weights")
    write_manifest(signed, {"step": 100})
    assert cli.main(["verify", str(signed)]) == cli.DONE
    capsys.readouterr()
    assert verify(signed, keys) == cli.FAILED
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["manifest.json", WEIGHTS]


@pytest.mark.parametrize("hint", ["as signed", "as ours", "none"])
def test_a_signature_with_another_key(hint: str, signed: Path, keys: Keys, other_keys: Keys, capsys: Output) -> None:
    """Whatever it says of the key that it was made with."""
    ours = json.loads((signed / "model.sig").read_text())["verificationMaterial"]["publicKey"]["hint"]
    assert cli.main(["sign", str(signed), "--private-key", other_keys.private]) == cli.DONE
    bundle = json.loads((signed / "model.sig").read_text())
    if hint != "as signed":
        bundle["verificationMaterial"]["publicKey"]["hint"] = ours if hint == "as ours" else ""
        (signed / "model.sig").write_text(json.dumps(bundle))
    capsys.readouterr()
    assert verify(signed, keys) == cli.FAILED
    expected = f"{signed}/model.sig: expected a signature with the private key of {keys.public}, found one with another"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(expected)]


def test_a_signature_of_another_folder(signed: Path, tmp_path: Path, keys: Keys, capsys: Output) -> None:
    other = fill(tmp_path / "other", {"a": b"1"})
    assert cli.main(["sign", str(other), "--private-key", keys.private]) == cli.DONE
    shutil.copy(other / "model.sig", signed / "model.sig")
    assert verify(signed, keys) == cli.FAILED
    assert "a: expected sha256 " in capsys.readouterr().out


def test_signing_again_replaces_the_signature(signed: Path, keys: Keys, other_keys: Keys, capsys: Output) -> None:
    assert cli.main(["sign", str(signed), "--private-key", other_keys.private]) == cli.DONE
    assert verify(signed, other_keys) == cli.DONE
    assert sorted(path.name for path in signed.iterdir()) == [
        *("manifest.json", "model", "model.sig", "state", "training.json")
    ]


def test_what_is_damaged_is_not_signed(tmp_path: Path, keys: Keys, capsys: Output) -> None:
    folder = make_checkpoint(tmp_path / "step-000100")
    (folder / WEIGHTS).write_bytes(b"other")
    assert cli.main(["sign", str(folder), "--private-key", keys.private]) == cli.FAILED
    assert "is not as its manifest.json records it" in capsys.readouterr().err
    assert not (folder / "model.sig").exists()


def encrypted_key(folder: Path) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "locked.pem").write_bytes(pem)
    return str(folder / "locked.pem")


def test_bad_usage_of_sign_is_one_line_and_exit_2(tmp_path: Path, keys: Keys, capsys: Output) -> None:
    folder = fill(tmp_path / "model", FILES)
    linked = fill(tmp_path / "linked", FILES)
    (linked / "x").symlink_to("training.json")
    (tmp_path / "empty").mkdir()
    shutil.copy(keys.private, folder / "mine.pem")
    rsa_keys = Keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    koblitz = Keys(tmp_path, "koblitz", ec.generate_private_key(ec.SECP256K1()))
    expected = "expected an elliptic-curve key (P-256, P-384 or P-521) in a PEM file"
    for arguments, line in (
        ([str(folder)], "the following arguments are required: --private-key"),
        ([str(folder), "--private-key", "nowhere"], "--private-key: cannot read 'nowhere': No such file"),
        ([str(folder), "--private-key", keys.public], f"--private-key: '{keys.public}' is no private key that can be"),
        ([str(folder), "--private-key", rsa_keys.private], f"is no private key that can be used; {expected}\n"),
        ([str(folder), "--private-key", koblitz.private], f"is no private key that can be used; {expected}\n"),
        ([str(folder), "--private-key", encrypted_key(tmp_path)], f"{expected}, without a password\n"),
        (
            [str(folder), "--private-key", str(folder / "mine.pem")],
            "lies in the folder to be signed; keep it elsewhere",
        ),
        ([str(tmp_path / "nowhere"), "--private-key", keys.private], "nowhere' is no folder; expected a checkpoint"),
        ([str(tmp_path / "empty"), "--private-key", keys.private], "holds no files; expected a model's folder"),
        ([str(linked), "--private-key", keys.private], "linked': x is a link; a signature covers regular files alone"),
        (
            [str(folder), "--private-key", keys.private, "--signature", str(folder / "a.sig")],
            "a.sig' lies in the folder; there its name is model.sig",
        ),
        (
            [str(folder), "--private-key", keys.private, "--signature", keys.public],
            f"--signature: '{keys.public}' exists and is no signature; give another path",
        ),
        (
            [str(folder), "--private-key", keys.private, "--signature", str(tmp_path / "no" / "a.sig")],
            "--signature: cannot write '",
        ),
    ):
        assert cli.main(["sign", *arguments]) == cli.WRONG, arguments
        captured = capsys.readouterr()
        assert captured.err.startswith("megatrain: ") and captured.err.count("\n") == 1
        assert line in captured.err
    assert Path(keys.public).read_text().startswith("-----BEGIN PUBLIC KEY-----")


def test_bad_usage_of_a_public_key_is_one_line_and_exit_2(signed: Path, keys: Keys, capsys: Output) -> None:
    for key, line in (
        ("nowhere", "--public-key: cannot read 'nowhere': No such file"),
        (keys.private, "is no public key that can be used; expected an elliptic-curve key"),
        (str(signed / "training.json"), "is no public key that can be used; expected an elliptic-curve key"),
    ):
        assert cli.main(["verify", str(signed), "--public-key", key]) == cli.WRONG
        captured = capsys.readouterr()
        assert line in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert verify(signed, keys, "--signature", str(signed.parent / "gone.sig")) == cli.WRONG
    assert "there is no signature '" in capsys.readouterr().err


def test_without_the_library_one_line_names_the_extra(
    signed: Path, keys: Keys, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for arguments in (["sign", "--private-key", keys.private], ["verify", "--public-key", keys.public]):
        assert cli.main([arguments[0], str(signed), *arguments[1:]]) == cli.WRONG
        captured = capsys.readouterr()
        assert captured.err.startswith("megatrain: signatures need the package model-signing (")
        assert captured.err.endswith("pip install 'megatrain[sign]'\n")
    assert cli.main(["verify", str(signed)]) == cli.DONE


def test_files_signed_in_parts_are_not_taken_for_something_else(tmp_path: Path, keys: Keys, capsys: Output) -> None:
    from model_signing import hashing
    from model_signing import signing as library

    folder = fill(tmp_path / "model", FILES)
    parts = hashing.Config().use_shard_serialization(shard_size=1000)
    signer = library.Config().use_elliptic_key_signer(private_key=keys.private).set_hashing_config(parts)
    signer.sign(folder, folder / "model.sig")
    assert verify(folder, keys) == cli.FAILED
    line = f"{folder}/model.sig: expected SHA-256 of whole files, found another way to hash, which is not known"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_signature_is_known_by_its_kind(signed: Path, tmp_path: Path) -> None:
    assert signing._is_signature(signed / "model.sig")
    for text in ("", "[]", "{}", '{"mediaType": "text/plain"}', "[" * 100_000):
        (tmp_path / "other").write_text(text)
        assert not signing._is_signature(tmp_path / "other")
