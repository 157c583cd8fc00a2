"""The `megatrain` command.

Exit codes: 0 done, 1 failed (or doctor found a problem, verify or audit a difference, or a run's last checkpoint could
not be saved), 2 bad usage or settings, 130 interrupted twice.
"""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megatrain.arguments import OneLineParser
from megatrain.config import describe, load_config
from megatrain.config_kinds import DEVICE, PATH
from megatrain.errors import CapacityError, ConfigError, MegaTrainError
from megatrain.version import __version__

if TYPE_CHECKING:
    from megatrain.train.run import RunResult

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
_DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
_DEMO_PROMPTS = ("import os\n\n\ndef", "class Reader:\n    def __init__(self,")
_DEMO_TEMPERATURE = 0.5  # a model this small wanders off at higher ones


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors are one line on standard error."""
    with _own_warnings():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    environment = dict(os.environ)
    # Before torch is imported. OpenMP threads that spin while they wait take the core from whoever they wait for:
    # beside another busy process a step on two cores took 13 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Before huggingface_hub is imported, too: it warns of every attempt to reach the hub; the last one is our error.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        return _dispatch(arguments, environment)
    except (ConfigError, CapacityError) as error:
        return _fail(error, WRONG)
    except MegaTrainError as error:
        return _fail(error, FAILED)
    except BrokenPipeError:  # such as `megatrain config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # not foreseen: still one line, and the whole story on request
        if os.environ.get("MEGATRAIN_DEBUG"):
            raise
        return _fail(f"{type(error).__name__}: {_said(error)} (MEGATRAIN_DEBUG=1 shows where)", FAILED)
    except KeyboardInterrupt:  # outside of training there is nothing to save
        return _fail("interrupted", INTERRUPTED)


@contextlib.contextmanager
def _own_warnings() -> Iterator[None]:
    """This package's warnings on standard error; what other libraries log is their own affair."""
    handler = _ToStandardError()
    handler.setFormatter(logging.Formatter("megatrain: %(message)s"))
    logger = logging.getLogger("megatrain")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _ToStandardError(logging.StreamHandler):
    """To what is standard error at the moment: while a progress bar is drawn, lines go above it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _given: TextIO) -> None:
        pass


def _dispatch(arguments: list[str], environment: dict[str, str]) -> int:
    """`environment`: as this program was started with."""
    if arguments[:1] == ["bench"]:  # it has options of its own
        from megatrain.train.bench import main as bench

        return int(bench(arguments[1:]))
    parser = _parser()
    overrides: list[tuple[str, str]] = []
    if arguments[:1] in (["train"], ["demo"]):
        arguments, overrides = _take_overrides(arguments)
    elif arguments[:1] in (["plan"], ["data"]):
        arguments, overrides = _take_dotted_overrides(arguments)
    known = parser.parse_args(arguments)
    if known.command in ("train", "demo"):
        command = _demo if known.command == "demo" else _train
        return command(known, overrides)
    if known.command == "plan":
        from megatrain.train.plan_command import plan_command

        return DONE if plan_command(known, overrides) else FAILED
    if known.command == "data":
        from megatrain.train.data_command import data_command

        data_command(known.config, overrides, examples=known.examples, as_json=known.json)
        return DONE
    if known.command == "generate":
        return _generate(known)
    if known.command == "export":
        return _export(known)
    if known.command == "init":
        return _init(known)
    if known.command == "report":
        from megatrain.report.page import write_report

        print(f"wrote {write_report(known.run, known.output)}")
        return DONE
    if known.command == "verify":
        from megatrain.trust.verify import verify

        signed = {"signature": known.signature, "public_key": known.public_key}
        return DONE if verify(known.folder, **signed, data=known.data) else FAILED
    if known.command == "audit":
        from megatrain.train.audit import audit

        return DONE if audit(known.run, steps=known.steps, device=known.device) else FAILED
    if known.command == "sign":
        from megatrain.trust.signing import sign

        print(f"wrote {sign(known.folder, known.private_key, known.signature)}")
        return DONE
    if known.command == "doctor":
        from megatrain.doctor.report import doctor

        return DONE if doctor(environment, as_json=known.json) else FAILED
    print(describe(), end="\n")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="megatrain", description="Exact full-precision training of large models.")
    parser.add_argument("--version", action="version", version=f"megatrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, meaning in (
        ("train", "train a model as a YAML file says"),
        ("demo", "train a small model on Python's own sources and show what it writes"),
    ):
        command = commands.add_parser(
            name,
            help=meaning,
            usage=f"megatrain {name} {'[CONFIG.yaml]' if name == 'demo' else 'CONFIG.yaml [--resume auto|PATH]'}"
            " [--profile N] [--section.key value ...]",
            allow_abbrev=False,
        )
        optional: dict[str, Any] = {"nargs": "?", "default": str(_DEMO_RECIPE)} if name == "demo" else {}
        command.add_argument(
            "config", metavar="CONFIG.yaml", help="settings; `megatrain config` lists all keys", **optional
        )
        command.add_argument(
            "--profile", type=_at_least(1), default=0, metavar="N", help="write a timeline of N steps to trace.json"
        )
        if name == "train":
            _add_resume(command)
    _add_plan(commands)
    _add_init(commands)
    data = commands.add_parser(
        "data",
        help="show the first examples as the model sees them, and all of them in numbers",
        usage="megatrain data CONFIG.yaml [--examples N] [--json] [--section.key value ...]",
        allow_abbrev=False,
    )
    data.add_argument("config", type=_path, metavar="CONFIG.yaml", help="settings of a run")
    data.add_argument("--examples", type=_at_least(0), default=3, metavar="N", help="how many to show; default: 3")
    data.add_argument("--json", action="store_true", help="print one JSON object")
    generate = commands.add_parser("generate", help="let a model write text", allow_abbrev=False)
    generate.add_argument("folder", type=_path, metavar="FOLDER", help="a run's folder or a transformers folder")
    generate.add_argument("--prompt", required=True, type=_text, help="text to go on from")
    generate.add_argument(
        "--image",
        action="append",
        default=[],
        type=_path,
        metavar="FILE",
        help="an image, may be repeated: the prompt is then what a user says about it, and what is printed the answer",
    )
    generate.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is what a user says, through the chat template, and what is printed the answer",
    )
    generate.add_argument("--max-new-tokens", type=_at_least(1), default=200, metavar="N")
    generate.add_argument("--seed", type=_at_least(0), default=0, metavar="S")
    generate.add_argument("--temperature", type=_temperature, default=0.8, help="0: always the likeliest token")
    _add_best(generate)
    export = commands.add_parser("export", help="write a run's model as a transformers folder", allow_abbrev=False)
    export.add_argument("run", type=_path, metavar="RUN", help="a run's folder or a transformers folder")
    export.add_argument("out", type=_path, metavar="OUT", help="a new folder")
    export.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    _add_best(export)
    report = commands.add_parser(
        "report", help="show a run as one HTML page that needs nothing else", allow_abbrev=False
    )
    report.add_argument("run", type=_path, metavar="RUN", help="a run's folder")
    report.add_argument("--output", type=_path, metavar="FILE", help="default: report.html in RUN")
    _add_trust(commands)
    commands.add_parser("config", help="print every key, its default and its meaning")
    doctor = commands.add_parser(
        "doctor", help="say what this machine offers for training and what will bite", allow_abbrev=False
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object; null is unknown")
    commands.add_parser("bench", help="measure speed and memory", add_help=False)
    return parser


def _add_best(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--best", action="store_true", help="of a run, the checkpoint with the lowest loss on data.eval, not the last"
    )
    command.add_argument("--no-verify", action="store_true", help="take a run's model without hashing its files")


def _add_resume(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--resume",
        metavar="auto|PATH",
        type=_text,
        help="go on from a checkpoint, or a run's last one; auto: the last one in output, or begin where there is none",
    )
    train.add_argument("--force", action="store_true", help="go on with settings or data that have changed")
    train.add_argument("--no-verify", action="store_true", help="go on without hashing the checkpoint's files")


def _add_trust(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="say what differs from what was recorded of a checkpoint or a run",
        description="Exit code: 0 where all is as recorded, 1 where something differs, 2 for bad usage.",
        allow_abbrev=False,
    )
    verify.add_argument("folder", type=_path, metavar="FOLDER", help="a checkpoint, a run's folder, or a signed folder")
    verify.add_argument("--signature", type=_path, metavar="FILE", help="default: model.sig in FOLDER")
    verify.add_argument("--public-key", type=_path, metavar="FILE", help="check the signature with it (PEM)")
    verify.add_argument(
        "--data", action="store_true", help="also the files trained on; from the folder that the run was started in"
    )
    audit = commands.add_parser(
        "audit",
        help="compute steps of a run again from what was recorded, and compare to the bit",
        description="Exit code: 0 where all is as recorded, 1 where something differs, 2 for bad usage.",
        allow_abbrev=False,
    )
    audit.add_argument("run", type=_path, metavar="RUN", help="a run's folder; from the folder that it was started in")
    audit.add_argument(
        "--steps", type=_steps, metavar="A:B", help="the first and the last; default: all that can be computed again"
    )
    audit.add_argument("--device", type=_device, help="default: as recorded")
    sign = commands.add_parser("sign", help="sign all files of a folder", allow_abbrev=False)
    sign.add_argument("folder", type=_path, metavar="FOLDER", help="a checkpoint, a run's folder or a model's")
    sign.add_argument("--private-key", type=_path, required=True, metavar="FILE", help="an elliptic-curve key (PEM)")
    sign.add_argument("--signature", type=_path, metavar="OUT", help="default: model.sig in FOLDER")


def _add_init(commands: Any) -> None:
    init = commands.add_parser(
        "init",
        help="write a commented config for a model and data, from the plan of this machine",
        description="Exit code: 0 where the config was written, 2 where the model has no room or something is wrong.",
        allow_abbrev=False,
    )
    init.add_argument("out", nargs="?", default="run.yaml", type=_path, metavar="OUT.yaml", help="default: run.yaml")
    init.add_argument("--model", required=True, type=_path, help="a transformers folder, a run's folder or a hub id")
    init.add_argument("--data", required=True, action="append", type=_text, help="as data.train; may be repeated")
    init.add_argument("--eval", action="append", default=[], type=_text, help="held-out data, as data.eval")
    init.add_argument("--epochs", default=1.0, type=_above_0, metavar="N", help="passes over the data; default: 1")
    init.add_argument("--seq-len", type=_at_least(2), metavar="N", help="tokens per sequence; default: 2048 at most")
    init.add_argument("--nvme", type=_path, metavar="FOLDER", help="a folder on a local disk for optimizer state")
    init.add_argument("--hardware", metavar="NAME|FILE.yaml", help="another machine; default: this one")
    init.add_argument("--replace", action="store_true", help="write over OUT.yaml")


def _init(known: argparse.Namespace) -> int:
    from megatrain.train.init_command import Wish, init

    target = Path(known.out)
    wish = Wish(
        known.model, tuple(known.data), tuple(known.eval), known.epochs, known.seq_len, known.nvme, known.hardware
    )
    plan = init(wish, target, replace=known.replace)
    print(f"wrote {target}: {plan.tokens:,} tokens per step, {plan.tokens_per_second:,.0f} tokens/s predicted")
    print(f"next: megatrain data {target}; megatrain plan {target}; megatrain train {target}")
    return DONE


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a model needs, where it would go and how long a step would take",
        usage="megatrain plan CONFIG.yaml|FOLDER|CONFIG.json|HUB-ID [options] [--section.key value ...]",
        description="Exit code: 0 where it fits, 1 where it does not (the plan is printed), 2 for bad usage.",
        allow_abbrev=False,
    )
    plan.add_argument("what", type=_path, metavar="MODEL", help="a run's settings, or a model: file, folder or hub id")
    plan.add_argument(
        "--hardware", metavar="NAME|FILE.yaml", help="a machine: a profile or a file of its keys; default: this one"
    )
    plan.add_argument("--host-memory", metavar="SIZE", help="host memory that may be used, such as 1.5TB")
    plan.add_argument("--device-memory", metavar="SIZE", help="device memory that may be used")
    plan.add_argument("--nvme", metavar="SIZE", help="NVMe that optimizer state may take; default: as engine.nvme")
    plan.add_argument("--moments", choices=("fp32", "int8"), help="how both moments are held; default: fp32")
    plan.add_argument("--tokens", metavar="N", help="say what so many tokens take, such as 10B")
    plan.add_argument("--seq-len", metavar="N", help="tokens per sequence")
    plan.add_argument("--tokens-per-step", metavar="N", help="tokens per optimizer step")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--timeline", metavar="OUT.json", help="write the predicted step for ui.perfetto.dev")


def _take_dotted_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """As `_take_overrides`, where a command has options of its own: an override has a dot in its name."""
    others: list[str] = []
    pairs: list[tuple[str, str]] = []
    words = iter(arguments)
    for word in words:
        if word.startswith("--") and "." in word.partition("=")[0]:
            pairs += _take_overrides([word] if "=" in word else [word, *[w for w in [next(words, None)] if w]])[1]
        else:
            others.append(word)
    return others, pairs


_TRAIN_OPTIONS = ("resume", "force", "no-verify")


def _take_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(other arguments, pairs of `--section.key value` or `--section.key=value`), wherever they stand."""
    others, pairs = [], []
    words = iter(arguments)
    for word in words:
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or name in ("", "help", "profile", *_TRAIN_OPTIONS):
            others.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"{word} has no value; expected --section.key value, such as --train.steps 100")
            value = following
        pairs.append((name, value))
    return others, pairs


def _train(known: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    config = load_config(known.config, overrides)
    from megatrain.train.run import run

    _leave_no_core_dump()
    result = run(
        config, profile_steps=known.profile, resume=known.resume, force=known.force, verify=not known.no_verify
    )
    _report(result)
    print(f"run folder: {result.folder}")
    return _ended(result.lost)


def _leave_no_core_dump() -> None:
    """A crash writes no file with activations, texts and keys; the weights' own memory is in no dump in any case."""
    if os.environ.get("MEGATRAIN_DEBUG"):
        return
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has such a limit
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _demo(known: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    config = load_config(known.config, overrides)
    from megatrain.train.generate import generate
    from megatrain.train.run import run

    result = run(config, replace=True, profile_steps=known.profile)
    _report(result)
    if result.interrupted or not config.checkpoint.at_end:
        print(f"run folder: {result.folder}")
        return _ended(result.lost)
    texts = generate(
        str(result.folder),
        list(_DEMO_PROMPTS),
        max_new_tokens=120,
        seed=config.train.seed,
        temperature=_DEMO_TEMPERATURE,
    )
    for prompt, text in zip(_DEMO_PROMPTS, texts, strict=True):
        print(f"\n--- the model goes on from {prompt!r} ---\n{text}")
    print(f"\nmodel: {result.folder / 'model'}")
    print(f"more:  {_own_command()} generate {shlex.quote(str(result.folder))} --prompt 'import'")
    return _ended(result.lost)


def _ended(lost: str | None) -> int:
    """The exit code of a run that trained to its end: scripts ask it whether all is there that they go on with."""
    return DONE if lost is None else _fail(lost, FAILED)


def _own_command() -> str:
    """What a shell calls this program by: as it was called, or the script beside the Python that runs it."""
    script = Path(sys.executable).with_name("megatrain")
    if Path(sys.argv[0]).name == script.name:
        script = Path(sys.argv[0])
    if not script.is_file():
        return f"{shlex.quote(sys.executable)} -m megatrain"
    on_path = shutil.which(script.name)
    if on_path is not None and os.path.samefile(on_path, script):
        return script.name
    with contextlib.suppress(ValueError):  # not below the current folder: the whole path
        script = script.absolute().relative_to(Path.cwd())
    return shlex.quote(str(script))


def _trained(result: "RunResult") -> str:
    done, total = result.loop.steps, result.total_steps
    if done == total or not result.loop.interrupted:
        return f"trained {done:,} steps"
    goes_on = "; the same command with --resume auto goes on" if result.goes_on else ""
    return f"trained {done:,} of {total:,} steps{goes_on}"


def _report(result: "RunResult") -> None:
    from megatrain.train.journal import described

    print(_trained(result))
    for name, one in result.evaluations.items():
        told = "held-out text" if len(result.evaluations) == 1 else f"held-out text {name}"
        over = f"over {one.target_tokens:,} tokens"
        if one.pairs is not None:
            print(f"{told}: {described(one)}")
        elif one.bits_per_byte is None:
            print(f"{told}: loss {one.loss:.3f}, perplexity {one.perplexity:,.2f} {over}")
        else:
            whole = f"loss {one.loss:.3f} {over}, {one.utf8_bytes:,} bytes not trained on"
            print(f"{told}: {one.bits_per_byte:.3f} bits per byte ({whole})")
    if result.best is not None:
        print(f"best checkpoint: {result.best[0]} (loss {result.best[1]:.4f})")


def _generate(known: argparse.Namespace) -> int:
    from megatrain.train.generate import generate

    texts = generate(
        _model_of(known.folder, best=known.best, verify=not known.no_verify),
        [known.prompt],
        images=known.image,
        chat=known.chat,
        max_new_tokens=known.max_new_tokens,
        seed=known.seed,
        temperature=known.temperature,
    )
    print(texts[0])
    return DONE


def _export(known: argparse.Namespace) -> int:
    from megatrain.train.export import export

    export(_model_of(known.run, best=known.best, verify=not known.no_verify), known.out, dtype=known.dtype)
    print(f"wrote {known.out}")
    return DONE


def _model_of(run: str, *, best: bool, verify: bool) -> str:
    """Which folder is meant: `run`, or the model of its best checkpoint; `verify`: as the run has recorded it."""
    from megatrain.train.best import best_checkpoint
    from megatrain.train.run_folder import model_folder
    from megatrain.trust.recorded import require_recorded_model

    if best:
        checkpoint, loss = best_checkpoint(run)
        print(f"{checkpoint.name}, with loss {loss:.4f} on data.eval", file=sys.stderr)
        run = str(checkpoint / "model")
    if verify:
        require_recorded_model(Path(os.path.abspath(model_folder(run))))
    return run


def _at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `minimum` up to what 63 bits hold."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if minimum <= int(text) < 1 << 63:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is wrong; expected a whole number of at least {minimum}")

    return parse


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is wrong; expected A:B, such as 1:100")
    return _at_least(1)(first), _at_least(1)(last)


def _device(text: str) -> str:
    try:
        return str(DEVICE.parse(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is wrong; expected {DEVICE.expected}") from None


def _temperature(text: str) -> float:
    with contextlib.suppress(ValueError):
        # logits divided by less than this may overflow
        if float(text) == 0 or 1e-4 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is wrong; expected 0 or a number of at least 0.0001")


def _above_0(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is wrong; expected a number above 0")


def _path(text: str) -> str:
    try:
        return str(PATH.parse(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is wrong; expected a path") from None


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is wrong; expected text in UTF-8") from None
    return text


def _said(error: Exception | str) -> str:
    return ". ".join([str(error), *getattr(error, "__notes__", ())])


def _fail(error: Exception | str, code: int) -> int:
    text = " ".join(_said(error).split())
    # names in it may be a stranger's: what would move a terminal's cursor is written out
    shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    print(f"megatrain: {shown}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
