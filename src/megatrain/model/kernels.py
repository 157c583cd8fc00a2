"""`engine.kernels`: Liger's fused kernels (PyPI liger-kernel, in Triton) in place of parts of a model's own code.

Liger replaces RMSNorm, layer norm, SwiGLU and GeGLU, rotary embeddings and some experts in models of transformers whose
type it knows. Its patching reaches further than the model it is given. What it changes, and what becomes of it here:

- methods and attributes of the model's modules (`forward`, `variance_epsilon`, `in_place`, ...) stay until
  `engine.close()` takes them back;
- functions of transformers' modules that modules call by name (`apply_rotary_pos_emb`) are put back at once. The
  methods of this model that call them are bound to it as copies that find Liger's function under that name; a copy
  sees the other names of its module as they were when it was made;
- classes in transformers' modules and `torch.nn.LayerNorm`, which models made later would get, are put back at once.

Its RMSNorm can write a gradient over the one that it was given, which a residual connection may still have to read: in
glm4v (liger-kernel 0.8.5) gradients come out wrong by a factor of up to 10^5, with the right loss. It may not here.

So no other model of the process is changed, but one that another thread makes at that very moment. Liger's
cross-entropy and its causal-LM forwards stay off: the head is the engine's (`fused_loss.py`).
"""

import logging
import operator
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from megatrain.errors import ConfigError

KERNELS = ("auto", "torch", "liger")
LEAST_LIGER = (0, 8, 5)  # the first whose fused loss takes a chunk of ours as one of its own
_DEVICE_TYPES = ("cuda",)  # where Triton compiles for

_log = logging.getLogger(__name__)
_patching = threading.Lock()


@dataclass(frozen=True, slots=True)
class Kernels:
    """What was chosen: 'torch' or 'liger', and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} kernels ({self.reason})"


def choose_kernels(setting: str, model: nn.Module, device: torch.device) -> Kernels:
    """The kernels that `setting` comes to for `model` on `device`; nothing is changed yet.

    Raises ConfigError for a wrong setting, and for liger where it cannot be used.
    """
    if setting not in KERNELS:
        raise ConfigError(f"engine.kernels is {setting!r}; it must be one of {', '.join(KERNELS)}")
    if setting == "torch":
        return Kernels("torch", "as asked for")
    obstacle = _obstacle(model, device)
    if obstacle is None:
        return Kernels("liger", "as asked for" if setting == "liger" else f"Liger knows {_type_of(model)}")
    if setting == "liger":
        raise ConfigError(f"engine.kernels is 'liger', which cannot be used: {obstacle}; use torch or auto")
    return Kernels("torch", obstacle)


def install_kernels(kernels: Kernels, model: nn.Module, *, required: bool) -> tuple[Kernels, Callable[[], None]]:
    """Put `kernels` into `model`: (what is there now, what takes it out again).

    Where Liger fails on a model of a type that it knows, that is a ConfigError if `required`, and else torch.
    """
    if kernels.name != "liger":
        return kernels, _nothing
    try:
        return kernels, _install_liger(model)
    except Exception as error:  # Liger's code, on whatever variant of the type this is
        what = f"Liger fails on {type(model).__name__}: {type(error).__name__}: {error}".splitlines()[0]
        if required:
            raise ConfigError(f"engine.kernels is 'liger', which cannot be used: {what}; use torch or auto") from error
        _log.warning("engine.kernels: torch, since %s", what)
        return Kernels("torch", what), _nothing


def _nothing() -> None:
    """Nothing to undo."""


# -- whether Liger can be used --------------------------------------------------------------------------------


def _obstacle(model: nn.Module, device: torch.device) -> str | None:
    """Why Liger cannot be used on `model`; None where it can."""
    if device.type not in _DEVICE_TYPES:
        return f"the device is {device.type}, and its kernels need cuda"
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return "liger-kernel is not installed"
    if util.find_spec("triton") is None:
        return "triton is not installed"
    if tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < LEAST_LIGER:
        return f"liger-kernel {version} is older than {'.'.join(map(str, LEAST_LIGER))}"
    if not _is_of_transformers(model):
        return f"{type(model).__name__} is not a model of transformers"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # it looks at the installation as it is imported
        return f"liger-kernel cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    if _type_of(model) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger does not know model type {_type_of(model)}"
    return None


def _is_of_transformers(model: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # what makes such a model has imported it
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _type_of(model: nn.Module) -> str:
    return str(model.config.model_type)  # type: ignore[union-attr]


# -- putting it in --------------------------------------------------------------------------------------------


def _install_liger(model: nn.Module) -> Callable[[], None]:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    instance = _InstanceState(model)
    try:
        with _patching:
            shared = _SharedState()
            try:
                _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
            finally:
                functions = shared.put_back()
        _bind_methods(model, functions)
        instance.set_where_added("in_place", False)
    except BaseException:
        instance.put_back()
        raise
    return instance.changes()


class _InstanceState:
    """The attributes and submodules of a model's modules, to find out what has changed about them."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (holder, dict(holder)) for module in model.modules() for holder in (module.__dict__, module._modules)
        ]

    def put_back(self) -> None:
        self.changes()()

    def set_where_added(self, name: str, value: Any) -> None:
        """Give attribute `name` this value on the modules that have got it."""
        for holder, before in self._before:
            if name in holder and name not in before:
                holder[name] = value

    def changes(self) -> Callable[[], None]:
        """What undoes the changes made so far, and none that come later."""
        absent = object()
        changed = [
            (holder, name, before.get(name, absent))
            for holder, before in self._before
            for name in {**before, **holder}
            if holder.get(name, absent) is not before.get(name, absent)
        ]

        def undo() -> None:
            for holder, name, value in changed:
                if value is absent:
                    holder.pop(name, None)
                else:
                    holder[name] = value

        return undo


Functions = Mapping[int, Mapping[str, Any]]  # by id of a module's globals: name -> the function put in its place


class _SharedState:
    """What all models share: the modules of transformers and of torch.nn."""

    def __init__(self) -> None:
        shared = [name for name in sys.modules if name.split(".")[0] == "transformers" or name.startswith("torch.nn")]
        self._before = [(vars(module), dict(vars(module))) for name in shared if (module := sys.modules[name])]

    def put_back(self) -> Functions:
        """Undo all changes; the functions among them, which the model's methods look up by name as they run."""
        functions = {}
        for holder, before in self._before:
            changed = {name: holder[name] for name in before if holder.get(name) is not before[name]}
            for name in changed:
                holder[name] = before[name]
            found = {name: new for name, new in changed.items() if callable(new) and not isinstance(new, type)}
            if found:
                functions[id(holder)] = found
        return functions


def _bind_methods(model: nn.Module, functions: Functions) -> None:
    """Bind methods that call one of `functions` to their modules, as copies that find the new one."""
    namespaces: dict[int, dict[str, Any]] = {}
    copies: dict[type, dict[str, FunctionType]] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in copies:
            pairs = [(name, method, _copy_with(method, functions, namespaces)) for name, method in _methods(kind)]
            copies[kind] = {name: copy for name, method, copy in pairs if copy is not method}
        for name, copy in copies[kind].items():
            if name not in module.__dict__:
                module.__dict__[name] = MethodType(copy, module)


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    seen: set[str] = set()
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(owner).items():
            if name not in seen and isinstance(value, FunctionType):
                yield name, value
            seen.add(name)


def _copy_with(function: FunctionType, functions: Functions, namespaces: dict[int, dict[str, Any]]) -> FunctionType:
    """`function`, or what it wraps, with `functions` under their names; itself where it calls none of them.

    `namespaces`: globals of the copies, by id of the original ones. They have no __name__, by which torch.compile would
    find the original module again.
    """
    own = functions.get(id(function.__globals__), {})
    before = function.__closure__ or ()
    cells = tuple(_copied_cell(cell, functions, namespaces) for cell in before)
    if not set(own) & _names(function.__code__) and all(map(operator.is_, cells, before)):
        return function
    space = function.__globals__
    if own:
        space = namespaces.setdefault(id(space), {k: v for k, v in {**space, **own}.items() if k != "__name__"})
    copy = FunctionType(function.__code__, space, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    copy.__qualname__, copy.__module__, copy.__doc__ = function.__qualname__, function.__module__, function.__doc__
    copy.__annotations__ = function.__annotations__
    return copy


def _copied_cell(cell: CellType, functions: Functions, namespaces: dict[int, dict[str, Any]]) -> CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # empty
        return cell
    if not isinstance(content, FunctionType) or any(other is cell for other in content.__closure__ or ()):
        return cell  # no function, or one that calls itself
    copy = _copy_with(content, functions, namespaces)
    return cell if copy is content else CellType(copy)


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
