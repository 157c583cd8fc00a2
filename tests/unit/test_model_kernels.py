"""engine.kernels: what is chosen and why, and that putting a library's kernels into one model reaches no other.

The library here is a stand-in that patches as Liger does, with code of its own; Liger itself is in test_liger.py.
"""

import copy
import importlib.metadata
import importlib.util
import logging
import sys
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from test_engine_toys import Net, make_engine
from tiny_models import tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import megatrain as mt
from megatrain.engine.setup import check_plan
from megatrain.errors import ConfigError
from megatrain.model import kernels
from megatrain.model.kernels import Kernels, choose_kernels, install_kernels

CUDA = torch.device("cpu")  # of which `usable` says that Triton compiles for it


def tiny(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind))


def _rms_norm(self: nn.Module, hidden: Tensor) -> Tensor:
    CALLS.append("norm")
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    CALLS.append("rotary")
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


class _Norm(nn.Module):
    pass


CALLS: list[str] = []


def _patch(model: nn.Module, **options: Any) -> None:
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    modeling_llama.apply_rotary_pos_emb = _rotary
    modeling_llama.LlamaRMSNorm = _Norm
    modeling_llama.nn.LayerNorm = _Norm
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.in_place = True
            module.__dict__["forward"] = MethodType(_rms_norm, module)
        if type(module).__name__ == "LlamaMLP":
            module.act_fn = nn.SiLU()


def _patch_and_fail(model: nn.Module, **options: Any) -> None:
    _patch(model, **options)
    raise AttributeError("'Odd' object has no attribute 'layers'\nand more")


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in is installed, and the host is a device that it has kernels for."""
    library, patches, functional = (ModuleType(name) for name in ("transformers", "monkey_patch", "functional"))
    library._apply_liger_kernel_to_instance = _patch
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": _patch}

    def fused(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any, **options: Any) -> Tensor:
        CALLS.append("loss")
        assert options["reduction"] == "sum" and options["chunk_mem_const"] * weight.shape[1] >= weight.shape[0]
        logits = nn.functional.linear(hidden, weight, bias).float()
        return nn.functional.cross_entropy(logits, targets, ignore_index=options["ignore_index"], reduction="sum")

    functional.liger_fused_linear_cross_entropy = fused
    for name, module in {
        "liger_kernel": ModuleType("liger_kernel"),
        "liger_kernel.transformers": library,
        "liger_kernel.transformers.monkey_patch": patches,
        "liger_kernel.transformers.functional": functional,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "_DEVICE_TYPES", ("cpu",))
    own_version, own_find = importlib.metadata.version, importlib.util.find_spec
    versions = {"liger-kernel": "0.8.5"}
    missing: set[str] = set()
    monkeypatch.setattr(kernels.metadata, "version", lambda name: versions.get(name) or own_version(name))
    monkeypatch.setattr(
        kernels.util,
        "find_spec",
        lambda name: None if name in missing else object() if name == "triton" else own_find(name),
    )
    CALLS.clear()
    return library, versions, missing


@pytest.mark.usefixtures("usable")
def test_what_is_chosen() -> None:
    assert choose_kernels("auto", tiny(), CUDA) == Kernels("liger", "Liger knows llama")
    assert choose_kernels("liger", tiny(), CUDA) == Kernels("liger", "as asked for")
    assert choose_kernels("torch", tiny(), CUDA) == Kernels("torch", "as asked for")
    assert str(choose_kernels("auto", tiny("gpt2"), CUDA)) == "torch kernels (Liger does not know model type gpt2)"


def _obstacles() -> dict[str, tuple[str, str]]:
    return {
        "device": ("llama", "the device is cpu, and its kernels need cuda"),
        "liger": ("llama", "liger-kernel is not installed"),
        "triton": ("llama", "triton is not installed"),
        "version": ("llama", "liger-kernel 0.8.4 is older than 0.8.5"),
        "type": ("gpt2", "Liger does not know model type gpt2"),
        "own": ("", "Net is not a model of transformers"),
        "import": ("llama", "liger-kernel cannot be imported: ModuleNotFoundError: "),
    }


@pytest.mark.parametrize("obstacle", _obstacles())
def test_what_stands_in_the_way_is_named(obstacle: str, usable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, versions, missing = usable
    kind, why = _obstacles()[obstacle]
    if obstacle == "device":
        monkeypatch.setattr(kernels, "_DEVICE_TYPES", ("cuda",))
    elif obstacle == "liger":

        def absent(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(kernels.metadata, "version", absent)
    elif obstacle == "triton":
        missing.add("triton")
    elif obstacle == "version":
        versions["liger-kernel"] = "0.8.4"
    elif obstacle == "import":
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    model = tiny(kind) if kind else Net()
    assert choose_kernels("auto", model, CUDA).name == "torch"
    with pytest.raises(ConfigError) as error:
        mt.Engine(model, device="cpu", kernels="liger")
    message = str(error.value)
    assert message.startswith(f"engine.kernels is 'liger', which cannot be used: {why}")
    assert message.endswith("; use torch or auto") and "\n" not in message
    engine = make_engine(model, kernels="auto")
    assert engine.kernels.name == "torch" and engine.kernels.reason.startswith(why)
    engine.close()


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.kernels is 'cuda'; it must be one of auto, torch, liger"):
        make_engine(tiny(), kernels="cuda")


@pytest.mark.usefixtures("usable")
def test_an_unknown_type_is_refused_before_its_weights_are_read() -> None:
    with torch.device("meta"):
        model = tiny("gpt2")
    with pytest.raises(ConfigError, match="Liger does not know model type gpt2"):
        check_plan(model, None, {"kernels": "liger", "device": "cpu"})


def _state(model: nn.Module) -> Any:
    shared = {(id(m), name): value for m in (modeling_llama, torch.nn) for name, value in vars(m).items()}
    return shared, [(dict(m.__dict__), dict(m._modules)) for m in model.modules()]


@pytest.mark.usefixtures("usable")
def test_one_model_is_changed_and_only_until_its_engine_closes() -> None:
    model, other = tiny(), tiny()
    before = _state(model)
    ids = torch.arange(1, 17).view(2, 8)
    engine = make_engine(model, kernels="liger", clip_norm=None)
    assert engine.head.fused is not None and not engine.executor._in_pass
    assert _state(model)[0] == before[0]  # no class or function that models share
    CALLS.clear()
    other(input_ids=ids, labels=ids).loss.backward()
    tiny()(input_ids=ids, labels=ids).loss.backward()
    copy.deepcopy(other)(input_ids=ids, labels=ids).loss.backward()
    assert CALLS == []
    engine.train_step([{"input_ids": ids, "labels": ids}])
    layers = len(model.model.layers)
    # each layer's first run and, but for a kept graph, its second; the last norm is a unit of its own
    assert CALLS.count("rotary") == 2 * layers and CALLS.count("norm") == 2 * (2 * layers + 1)
    assert CALLS.count("loss") == 1
    engine.close()
    after = _state(model)
    assert after[0] == before[0]
    assert [set(d) for d, _ in after[1]] == [set(d) for d, _ in before[1]]
    assert [m for _, m in after[1]] == [m for _, m in before[1]]
    CALLS.clear()
    model(input_ids=ids, labels=ids).loss.backward()
    assert CALLS == []


@pytest.mark.usefixtures("usable")
def test_the_order_in_which_engines_close_does_not_matter() -> None:
    first, second = tiny(), tiny()
    ids = torch.arange(1, 17).view(2, 8)
    engines = [make_engine(model, kernels="liger") for model in (first, second)]
    engines[0].close()
    CALLS.clear()
    engines[1].train_step([{"input_ids": ids, "labels": ids}])
    assert "rotary" in CALLS and "norm" in CALLS
    engines[1].close()
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


@pytest.mark.usefixtures("usable")
def test_a_copy_of_the_model_has_its_own_methods() -> None:
    model = tiny()
    _, remove = install_kernels(Kernels("liger", ""), model, required=True)
    twin = copy.deepcopy(model)
    for one, two in zip(model.modules(), twin.modules(), strict=True):
        if "forward" in one.__dict__:
            assert one.forward.__self__ is one and two.forward.__self__ is two
    remove()


@pytest.mark.usefixtures("usable")
def test_no_norm_writes_over_the_gradient_it_is_given() -> None:
    model = tiny()
    model.lm_head.in_place = True  # its owner's, for whatever it means
    _, remove = install_kernels(Kernels("liger", ""), model, required=True)
    assert {m.in_place for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"} == {False}
    assert model.lm_head.in_place is True
    remove()
    assert not hasattr(model.model.norm, "in_place") and model.lm_head.in_place is True


def test_what_liger_fails_on_is_as_it_was(usable: Any, caplog: pytest.LogCaptureFixture) -> None:
    usable[0]._apply_liger_kernel_to_instance = _patch_and_fail
    model = tiny()
    before = _state(model)
    why = "Liger fails on LlamaForCausalLM: AttributeError: 'Odd' object has no attribute 'layers'"
    with pytest.raises(ConfigError) as error:
        make_engine(model, kernels="liger")
    assert str(error.value) == f"engine.kernels is 'liger', which cannot be used: {why}; use torch or auto"
    assert _state(model)[0] == before[0]
    assert [set(d) for d, _ in _state(model)[1]] == [set(d) for d, _ in before[1]]
    with caplog.at_level(logging.WARNING, "megatrain"):
        engine = make_engine(model, kernels="auto")
    assert engine.kernels == Kernels("torch", why) and caplog.messages == [f"engine.kernels: torch, since {why}"]
    engine.close()


def _wrapped(function: Any) -> Any:
    def outer(*args: Any) -> Any:
        return function(*args) + 0

    return outer


def helper(x: int) -> int:
    return x


def test_methods_are_found_behind_decorators_and_in_inner_functions() -> None:
    class Part(nn.Module):
        def plain(self, x: int) -> int:
            return x + 1

        def inner(self, x: int) -> list[int]:
            return [helper(value) for value in (x, x)]

        def keyword(self, x: int, *, more: int = 5) -> int:
            return helper(x) + more

    Part.forward = _wrapped(lambda self, x: helper(x))
    part, twin = Part(), Part()
    kernels._bind_methods(part, {id(globals()): {"helper": lambda x: 10 * x}})
    assert (part.forward(2), part.inner(2), part.keyword(2), part.keyword(2, more=1)) == (20, [20, 20], 25, 21)
    assert (twin.forward(2), twin.inner(2), twin.keyword(2)) == (2, [2, 2], 7)
    assert "plain" not in part.__dict__
