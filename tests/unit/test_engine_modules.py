"""A user's own modules, without transformers: whatever a unit does, training is plain PyTorch's to the last bit."""

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import gradient_differences, weight_differences
from test_engine_toys import (
    VOCABULARY,
    WIDTH,
    Block,
    Net,
    Output,
    assert_close_weights,
    assert_free_loop_like_plain,
    assert_same_buffers,
    assert_trains_like_plain,
    batches_of,
    make_batch,
    make_engine,
    plain_trainer,
)
from torch import Tensor, nn

import megatrain as mt
from megatrain.engine.shown_gradients import HeldGradient
from megatrain.errors import UnsupportedModelError


def assert_right_or_refused(model: nn.Module, unit: str, steps: int = 3) -> None:
    """What cannot be repeated exactly may be refused, by the unit's name; it must never be silently wrong."""
    message = None
    try:
        assert_trains_like_plain(model, steps=steps)
    except UnsupportedModelError as error:
        message = str(error)
    assert message is None or unit in message


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


# -- what a model may return ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda loss: Output(loss),
    lambda loss: {"loss": loss, "number": 3},
    lambda loss: (loss, None),
    lambda loss: loss,
], ids=["attribute", "key", "tuple", "tensor"])  # fmt: skip
def test_loss_is_found_in_what_the_model_returns(wrap: Any) -> None:
    class Wrapped(Net):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return wrap(super().forward(input_ids, labels).loss)

    plain, model = Net(), Wrapped()
    engine, trainer = make_engine(model), plain_trainer(plain)
    for step in range(2):
        loss = trainer.backward(batches_of(step, 3))
        stats = engine.train_step(batches_of(step, 3))
        assert stats.loss == loss
        trainer.update(stats.grad_norm)
        assert weight_differences(plain, engine) == []


def test_a_model_without_a_loss_is_refused_by_what_it_returned() -> None:
    class NoLoss(Net):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return {"logits": self.head(self.hidden(input_ids))}

    with pytest.raises(mt.ConfigError, match="loss"):
        make_engine(NoLoss()).train_step([make_batch(0)])


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_module_list_of_blocks(micro_batches: int) -> None:
    engine = assert_trains_like_plain(Net(count=3), micro_batches=micro_batches, steps=5)
    assert [u.name for u in engine.partition.units] == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]


def test_sequential_of_composite_blocks() -> None:
    model = Net(count=1)
    model.blocks = nn.Sequential(Block(), Block(), Block())
    assert_trains_like_plain(model, micro_batches=2)


def test_model_without_blocks_is_one_unit() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            logits = self.head(self.embed(input_ids).relu())
            return Output(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))

    engine = assert_trains_like_plain(Flat(), micro_batches=2)
    assert len(engine.partition.units) == 1


def test_torch_transformer_encoder() -> None:
    class Encoder(Net):
        def __init__(self) -> None:
            super().__init__(count=1)
            torch.manual_seed(1)
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)
            self.blocks = nn.ModuleList([nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)])

    assert_trains_like_plain(Encoder(), micro_batches=2)


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_stray_parameters(micro_batches: int) -> None:
    class Stray(Net):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.linspace(-1, 1, WIDTH))
            self.scale = nn.Parameter(torch.ones(2, WIDTH))

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids) + self.start
            for block, scale in zip(self.blocks, self.scale, strict=True):
                x = block(x) * scale
            return x

    engine = assert_trains_like_plain(Stray(), micro_batches=micro_batches)
    assert {slot.name for slot in engine.partition.strays} == {"start", "scale"}


class ReadsEmbedding(Net):
    """The logits come from the embedding's weight, without calling the embedding."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return Output(self.loss(F.linear(self.hidden(input_ids), self.embed.weight), labels))


def test_parameter_read_without_calling_its_owner() -> None:
    model = ReadsEmbedding()
    del model.head
    assert_trains_like_plain(model)


def test_parameter_read_without_calling_its_owner_with_micro_batches() -> None:
    model = ReadsEmbedding()
    del model.head
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model), plain_trainer(plain)
    for step in range(3):
        trainer.backward(batches_of(step, 3))
        trainer.update(engine.train_step(batches_of(step, 3)).grad_norm)
    assert_close_weights(plain, engine, 1e-5)


class NeverCalled(Net):
    """Reads the head's weight; the head itself is never called."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        return Output(self.loss(F.linear(self.hidden(input_ids), self.head.weight), labels))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_parameter_whose_owner_is_never_called_is_up_to_date_when_read(micro_batches: int) -> None:
    assert_trains_like_plain(NeverCalled(), micro_batches=micro_batches, steps=4)


@pytest.mark.parametrize("settings", [{"clip_norm": None}, {"clip_norm": 0.5, "clip_scope": "unit"}])
def test_parameter_whose_owner_is_never_called_without_a_global_norm(settings: dict[str, Any]) -> None:
    model, plain = NeverCalled(), NeverCalled()
    engine, trainer = make_engine(model, **settings), plain_trainer(plain, clip_norm=None)
    if settings["clip_norm"] is None:
        for step in range(4):
            loss = trainer.backward(batches_of(step, 2))
            assert engine.train_step(batches_of(step, 2)).loss == loss, f"step {step}"
            trainer.update(1.0)
        assert weight_differences(plain, engine) == []
    else:
        before = model.head.weight.detach().clone()
        engine.train_step(batches_of(0, 2))
        engine.flush()
        assert not torch.equal(model.head.weight, before)


def test_parameter_read_before_its_owner_is_called() -> None:
    class ReadsFirst(Net):
        def hidden(self, input_ids: Tensor) -> Tensor:
            x = F.embedding(input_ids, self.embed.weight)
            for block in self.blocks:
                x = block(x)
            return x + self.embed(input_ids)

    assert_trains_like_plain(ReadsFirst(), steps=4)


def test_method_of_a_block_other_than_forward() -> None:
    """The root calls into a unit past its forward; the weights have to be the updated ones."""

    class Project(Block):
        def project(self, x: Tensor) -> Tensor:
            return F.linear(x, self.up.weight)

    class Bypassing(Net):
        def __init__(self) -> None:
            super().__init__(Project)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            extra = self.blocks[1].project(x)
            for block in self.blocks:
                x = block(x)
            return x + extra[..., :WIDTH]

    assert_trains_like_plain(Bypassing(), steps=4)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("frozen", ["blocks.0.", "blocks.1.", "embed.", "head.", "blocks.0.up.", ".weight"])
def test_frozen_parameters(frozen: str, micro_batches: int) -> None:
    """Whole units, first, middle and last; parts of units; all but biases."""
    model = Net()
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert_trains_like_plain(model, micro_batches=micro_batches)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (frozen in name), name


def test_frozen_unit_is_not_recomputed_where_no_gradient_passes() -> None:
    calls: list[str] = []

    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("run")
            return super().forward(x)

    model = Net(Counting, count=2)
    for module in (model.embed, model.blocks[0]):
        module.requires_grad_(False)
    engine = make_engine(model)
    calls.clear()
    engine.train_step([make_batch(0)])
    assert len(calls) == 3  # the frozen block once, the trained one twice


def test_shared_block_called_twice() -> None:
    class Twice(Net):
        def hidden(self, input_ids: Tensor) -> Tensor:
            return super().hidden(input_ids) + self.blocks[0](self.embed(input_ids) * 2)

    assert_trains_like_plain(Twice(), micro_batches=1)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_one_block_under_several_indices(micro_batches: int) -> None:
    def shared() -> Net:
        model = Net(count=3)
        model.blocks[2] = model.blocks[0]
        return model

    model, plain = shared(), shared()
    engine, trainer = make_engine(model), plain_trainer(plain)
    for step in range(3):
        loss = trainer.backward(batches_of(step, micro_batches))
        assert engine.train_step(batches_of(step, micro_batches)).loss == pytest.approx(loss, rel=1e-6)
        trainer.update(float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])))
    assert len(engine.partition.units) == 4
    assert_close_weights(plain, engine, 1e-5)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_tied_weights(micro_batches: int) -> None:
    model = Net()
    model.head.weight = model.embed.weight
    engine = assert_trains_like_plain(model, micro_batches=micro_batches)
    assert model.head.weight is model.embed.weight
    assert engine.store.bytes_by_category()["weights"] < 4 * sum(p.numel() for p in Net().parameters())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.attention(x, x, x, need_weights=False)[0]


class AttentionOutside(Net):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.pool = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def hidden(self, input_ids: Tensor) -> Tensor:
        x = super().hidden(input_ids)
        return x + self.pool(x, x, x)[0]


@pytest.mark.parametrize("make", [lambda: Net(Attention), AttentionOutside], ids=["inside", "outside"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_multihead_attention_reads_its_output_projection_itself(make: Any, micro_batches: int) -> None:
    assert_trains_like_plain(make(), micro_batches=micro_batches)


def test_parameter_that_got_no_gradient_is_not_touched() -> None:
    """AdamW skips it: no decay, no moment, no step count; once it gets one, its first step is step 1."""

    class Optional(Block):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(WIDTH, WIDTH)
            self.used = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.extra(x) if self.used else 0)

    model = Net(Optional)
    plain = copy.deepcopy(model)
    engine, trainer = make_engine(model), plain_trainer(plain)
    before = model.blocks[0].extra.weight.detach().clone()
    slot = next(s for s in engine.partition.slots if s.name == "blocks.0.extra.weight").index
    for step in range(4):
        for one in (plain, model):
            one.blocks[0].used = step >= 2
        trainer.backward(batches_of(step, 2))
        stats = engine.train_step(batches_of(step, 2))
        assert (slot in engine.last_touched) == (step >= 2)
        assert engine.store.slots[slot].steps == max(0, step - 1)
        trainer.update(stats.grad_norm)
        assert weight_differences(plain, engine) == []
        assert torch.equal(model.blocks[0].extra.weight, before) == (step < 2)
    assert torch.equal(model.blocks[1].extra.weight, plain.blocks[1].extra.weight)


def test_unit_that_no_gradient_reaches() -> None:
    class Detached(Net):
        def hidden(self, input_ids: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](self.embed(input_ids)).detach())

    assert_trains_like_plain(Detached(), micro_batches=2)


# -- arguments and results -------------------------------------------------------------------------------------------


def test_integer_and_boolean_outputs() -> None:
    class Routing(Block):
        def forward(self, x: Tensor) -> Any:
            x = super().forward(x)
            return x, x.argmax(-1), x > 0

    class Routed(Net):
        def __init__(self) -> None:
            super().__init__(Routing)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x, index, positive = block(x)
                assert index.dtype == torch.long and positive.dtype == torch.bool
                x = torch.where(positive, x, x * 0.1) + F.one_hot(index, WIDTH)
            return x

    assert_trains_like_plain(Routed(), micro_batches=2)


def test_complex_outputs_keep_their_gradient() -> None:
    class Spectrum(Block):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(super().forward(x), dim=-1)

    class Spectral(Net):
        def __init__(self) -> None:
            super().__init__(Spectrum)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = torch.fft.irfft(block(x), n=WIDTH, dim=-1)
            return x

    assert_trains_like_plain(Spectral())


class Identity(nn.Module):
    """Has a parameter that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_output_that_is_the_input() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.insert(1, Identity())
            self.blocks.insert(0, Identity())

    assert_trains_like_plain(Mixed(), micro_batches=2)


def test_input_is_returned_beside_another_result() -> None:
    class Both(Block):
        def forward(self, x: Tensor, first: Tensor) -> Any:
            return super().forward(x), first

    class Carrying(Net):
        def __init__(self) -> None:
            super().__init__(Both)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = first = self.embed(input_ids)
            for block in self.blocks:
                x, first = block(x, first)
            return x + first

    assert_trains_like_plain(Carrying(), micro_batches=2, steps=1, tolerance=1e-6)


def test_output_that_is_a_view_of_the_input() -> None:
    class Half(Block):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x[..., ::2], x.transpose(0, 1)

    class Viewing(Net):
        def __init__(self) -> None:
            super().__init__(Half)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x, half, turned = block(x)
                x = x + half.repeat(1, 1, 2) * turned.transpose(0, 1)
            return x

    assert_trains_like_plain(Viewing(), micro_batches=2)


def test_model_changes_a_units_result_in_place() -> None:
    """What unit returns is the model's: `hidden += position` is common."""

    class InPlace(Net):
        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            x += torch.linspace(0, 1, WIDTH)
            for block in self.blocks:
                x = block(x).mul_(1.1)
            return x

    assert_trains_like_plain(InPlace(), micro_batches=2)


def test_model_changes_one_of_several_results_in_place() -> None:
    class Two(Block):
        def forward(self, x: Tensor) -> Any:
            x = super().forward(x)
            return x, x * 2

    class InPlace(Net):
        def __init__(self) -> None:
            super().__init__(Two)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x, twice = block(x)
                x += twice
            return x

    assert_trains_like_plain(InPlace())


@pytest.mark.parametrize("layout", ["nested", "keyword", "repeated"])
def test_arguments_in_containers(layout: str) -> None:
    class Taking(Block):
        def forward(self, x: Any, scale: Any = None, **options: Any) -> Any:
            if layout == "nested":
                x, (bias, factor) = x["hidden"], x["more"]
                return {"hidden": super().forward(x) + bias * factor, "more": (bias, 0.5)}
            if layout == "keyword":
                return super().forward(x) * scale[0] + options["shift"]["by"]
            return super().forward(x + scale)

    class Giving(Net):
        def __init__(self) -> None:
            super().__init__(Taking)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = start = self.embed(input_ids)
            for block in self.blocks:
                if layout == "nested":
                    x = block({"hidden": x, "more": (start, 2.0)})["hidden"]
                elif layout == "keyword":
                    x = block(x, scale=[start], shift={"by": start.mean(-1, keepdim=True)})
                else:
                    x = block(x, x)
            return x

    assert_trains_like_plain(Giving(), steps=1, tolerance=1e-6)


def test_gradient_of_given_embeddings() -> None:
    class FromEmbeddings(Net):
        def forward(self, inputs_embeds: Tensor, labels: Tensor) -> Any:
            x = inputs_embeds
            for block in self.blocks:
                x = block(x)
            return Output(self.loss(self.head(x), labels))

    plain, model = FromEmbeddings(), FromEmbeddings()
    make_engine(model)
    labels = make_batch(0)["labels"]
    embeddings = [torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    for one, given in zip((plain, model), embeddings, strict=True):
        one(given.requires_grad_(), labels).loss.backward()
    assert torch.equal(embeddings[0].grad, embeddings[1].grad)


class SharesStates(nn.Module):
    """The first block writes into a dict that the others read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        if "keys" not in shared:
            shared["keys"] = self.inner.up(x)
        else:
            x = x + shared["keys"][..., :WIDTH].tanh()
        shared["last"] = x * 2
        return self.inner(x)


def test_dict_shared_between_blocks() -> None:
    class Sharing(Net):
        def __init__(self) -> None:
            super().__init__(SharesStates, count=3)

        def hidden(self, input_ids: Tensor) -> Tensor:
            shared: dict[str, Tensor] = {}
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x, shared)
            assert set(shared) == {"keys", "last"}
            return x + shared["last"]

    assert_trains_like_plain(Sharing(), micro_batches=2)


def test_list_changed_by_a_block_is_refused() -> None:
    class Appending(Block):
        def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
            seen.append(x)
            return super().forward(x)

    class Lists(Net):
        def __init__(self) -> None:
            super().__init__(Appending)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x, seen = self.embed(input_ids), []
            for block in self.blocks:
                x = block(x, seen)
            return x + sum(seen)

    with pytest.raises(UnsupportedModelError, match=r"blocks\.0.*list"):
        make_engine(Lists()).train_step([make_batch(0)])


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_mutable_object_is_refused_by_name() -> None:
    class Reading(Block):
        def forward(self, x: Tensor, holder: Holder) -> Tensor:
            return super().forward(x + holder.value)

    class Holding(Net):
        def __init__(self) -> None:
            super().__init__(Reading)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            holder = Holder(x)
            for block in self.blocks:
                x = block(x, holder)
            return x

    model = Holding()
    engine = make_engine(model)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0.*Holder"):
        engine.train_step([make_batch(0)])
    with torch.no_grad():  # nothing to recompute
        model(**make_batch(0))


def test_dataclass_written_by_a_block_is_honoured_or_refused() -> None:
    class Writing(Block):
        def forward(self, x: Tensor, state: Output) -> Tensor:
            state.loss = state.loss + x.mean()
            return super().forward(x)

    class Stateful(Net):
        def __init__(self) -> None:
            super().__init__(Writing)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            x, state = self.embed(input_ids), Output(torch.zeros(()))
            for block in self.blocks:
                x = block(x, state)
            return Output(self.loss(self.head(x), labels) + state.loss)

    assert_right_or_refused(Stateful(), "blocks.0")


@pytest.mark.parametrize("trained_input", [True, False])
def test_in_place_change_of_an_input_is_refused(trained_input: bool) -> None:
    class Overwriting(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            (x if trained_input else mask).mul_(0.5)
            return super().forward(x) * mask

    class InPlace(Net):
        def __init__(self) -> None:
            super().__init__(Overwriting)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x, mask = self.embed(input_ids), torch.ones(input_ids.shape).unsqueeze(-1)
            for block in self.blocks:
                x = block(x, mask)
            return x

    with pytest.raises(UnsupportedModelError, match=r"blocks\.0.*in place"):
        make_engine(InPlace()).train_step([make_batch(0)])


def test_in_place_change_of_a_view_of_an_input_is_refused() -> None:
    class Overwriting(Block):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            mask[0].zero_()
            return super().forward(x) * mask

    class InPlace(Net):
        def __init__(self) -> None:
            super().__init__(Overwriting)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x, mask = self.embed(input_ids), torch.ones(input_ids.shape).unsqueeze(-1)
            for block in self.blocks:
                x = block(x, mask)
            return x

    with pytest.raises(UnsupportedModelError, match="in place"):
        make_engine(InPlace()).train_step([make_batch(0)])


# -- tensors that reach a unit, or leave it, by other ways -----------------------------------------------------------


class LeavesLoss(Block):
    """Leaves a loss on itself; the root adds it up."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux = (y * y).mean()
        return y


class AddsUp(Net):
    def __init__(self, block: Any = LeavesLoss) -> None:
        super().__init__(block)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        loss = super().forward(input_ids, labels).loss
        return Output(loss + 0.1 * sum(block.aux for block in self.blocks))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_tensor_assigned_to_an_attribute_keeps_its_gradient(micro_batches: int) -> None:
    assert_trains_like_plain(AddsUp(), micro_batches=micro_batches)


def test_attribute_assigned_only_while_training() -> None:
    """The first forward with gradients on runs in eval mode and assigns nothing."""

    class WhileTraining(Block):
        def __init__(self) -> None:
            super().__init__()
            self.aux = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.training:
                self.aux = (y * y).mean()
            return y

    def evaluate_first(engine: mt.Engine) -> None:
        engine.model.eval()
        engine.model(**make_batch(0))
        engine.model.train()

    assert_trains_like_plain(AddsUp(WhileTraining), prepare=evaluate_first)


def test_tensors_kept_in_a_list_on_the_module_are_right_or_refused() -> None:
    class Keeping(Block):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.kept.append(self.up.weight.sum() * 0.1)
            return y

    class Summing(Net):
        def __init__(self) -> None:
            super().__init__(Keeping)

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            loss = super().forward(input_ids, labels).loss
            for block in self.blocks:
                loss = loss + sum(block.kept)
                block.kept.clear()
            return Output(loss)

    assert_right_or_refused(Summing(), "blocks.0")


class Conditioned(Block):
    """Reads a tensor that the root has left on it."""

    condition: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.condition


def test_tensor_that_the_root_left_on_a_block_is_right_or_refused() -> None:
    class Conditioning(Net):
        def __init__(self) -> None:
            super().__init__(Conditioned)

        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            condition = x.mean(dim=1, keepdim=True)
            for block in self.blocks:
                block.condition = condition
                x = block(x)
            return x

    assert_right_or_refused(Conditioning(), "blocks.0")


def test_block_that_reads_what_another_block_left_is_right_or_refused() -> None:
    class ReadsNeighbour(LeavesLoss):
        def __init__(self) -> None:
            super().__init__()
            self.neighbour: list[nn.Module] = []

        def forward(self, x: Tensor) -> Tensor:
            for other in self.neighbour:
                x = x * other.aux
            return super().forward(x)

    class Chained(Net):
        def __init__(self) -> None:
            super().__init__(ReadsNeighbour)
            self.blocks[1].neighbour.append(self.blocks[0])

    assert_right_or_refused(Chained(), "blocks.1")


class Borrowing(Block):
    """Uses a module that is registered elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.borrowed: list[nn.Linear] = []
        self.calls = True

    def forward(self, x: Tensor) -> Tensor:
        (linear,) = self.borrowed
        return super().forward(x) + (linear(x) if self.calls else F.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize("calls", [True, False], ids=["called", "read"])
def test_block_that_uses_a_module_registered_elsewhere_is_right_or_refused(calls: bool) -> None:
    class Lending(Net):
        def __init__(self) -> None:
            super().__init__(Borrowing)
            torch.manual_seed(3)
            self.lent = nn.Linear(WIDTH, WIDTH)
            for block in self.blocks:
                block.borrowed.append(self.lent)
                block.calls = calls

    assert_right_or_refused(Lending(), "blocks.0", steps=4)


# -- buffers ---------------------------------------------------------------------------------------------------------


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(WIDTH, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_batch_norm_statistics_move_once_a_forward(micro_batches: int) -> None:
    model = Net(Normed)
    assert_trains_like_plain(model, micro_batches=micro_batches)
    assert model.blocks[0].batch_norm.num_batches_tracked == 3 * micro_batches


def test_batch_norm_after_a_first_forward_in_eval_mode() -> None:
    """The statistics do not move in the first forward with gradients on; they do later."""

    def evaluate_first(engine: mt.Engine) -> None:
        engine.model.eval()
        engine.model(**make_batch(0))
        engine.model.train()

    assert_trains_like_plain(Net(Normed), prepare=evaluate_first)


def test_batch_norm_statistics_of_a_skipped_step_move_as_in_plain_pytorch() -> None:
    """GradScaler skips the update of a step whose forward has run, too."""

    class Exploding(Net):
        factor = 1.0

        def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
            return super().loss(logits, labels) * self.factor

    plain, model = Exploding(Normed), Exploding(Normed)
    engine, trainer = make_engine(model), plain_trainer(plain)
    for factor in (1.0, float("inf"), 1.0):
        plain.factor = model.factor = factor
        trainer.backward([make_batch(0)])
        stats = engine.train_step([make_batch(0)])
        assert stats.skipped == (factor != 1.0)
        assert_same_buffers(plain, model)
        if not stats.skipped:
            trainer.update(stats.grad_norm)
        else:
            plain.zero_grad()
    assert model.blocks[0].batch_norm.num_batches_tracked == 3
    assert weight_differences(plain, engine) == []


class Averages(Block):
    """A running mean that its own output depends on."""

    in_place = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        new = x.detach().mean((0, 1))
        if self.in_place:
            self.mean.mul_(0.9).add_(new, alpha=0.1)
            self.count += 1
        else:
            self.mean = 0.9 * self.mean + 0.1 * new
            self.count = self.count + 1
        return super().forward(x - self.mean) / self.count


class Assigned(Averages):
    in_place = False


@pytest.mark.parametrize("block", [Averages, Assigned])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_buffer_that_the_forward_writes_and_reads(block: Any, micro_batches: int) -> None:
    model = Net(block)
    assert_trains_like_plain(model, micro_batches=micro_batches)
    assert model.blocks[0].count == 3 * micro_batches


def test_number_counted_by_the_forward_counts_forwards() -> None:
    """A plain number on the module, which the result depends on: recomputation must see what the forward saw."""

    class Warming(Block):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x) * (1 - 0.5**self.seen)

    assert_right_or_refused(Net(Warming), "blocks.0")


# -- kept graphs, memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["all", "some"])
@pytest.mark.parametrize("block", [Block, LeavesLoss, Normed, Averages], ids=lambda b: b.__name__)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_kept_graphs_give_the_same_bits(kept: str, block: Any, micro_batches: int) -> None:
    def keep(engine: mt.Engine) -> None:
        units = [unit.index for unit in engine.partition.units]
        engine.executor.kept_units.update(units if kept == "all" else units[1:-1])

    make = AddsUp if block is LeavesLoss else Net
    assert_trains_like_plain(make(block), micro_batches=micro_batches, prepare=keep, keep_graphs="off")


@pytest.mark.parametrize("kept", [False, True])
def test_kept_graph_spares_the_second_run(kept: bool) -> None:
    calls: list[str] = []

    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("run")
            return super().forward(x)

    engine = make_engine(Net(Counting, count=3), keep_graphs="off")
    if kept:
        engine.executor.kept_units.update(unit.index for unit in engine.partition.units)
    engine.train_step(batches_of(0, 2))
    assert len(calls) == (6 if kept else 12)


def test_between_forward_and_backward_only_inputs_are_kept() -> None:
    """Activations inside blocks are gone: none of their (recognisable) shape is alive after the forward."""
    model = Net(count=3)
    make_engine(model)
    batch = make_batch(0, rows=13, length=11, masked=0)

    def inner_activations() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (13, 11, 2 * WIDTH)]

    loss = model(**batch).loss
    assert inner_activations() == []
    loss.backward()


def test_free_loop_runs_what_train_step_runs() -> None:
    assert_free_loop_like_plain(Net(count=3), own_loss)


def test_gradients_do_not_stay_on_the_parameters() -> None:
    model, plain = NeverCalled(), NeverCalled()
    engine = make_engine(model)
    plain(**make_batch(0)).loss.backward()
    model(**make_batch(0)).loss.backward()
    assert all(isinstance(p.grad, HeldGradient) for p in model.parameters())  # which holds no value
    engine.step()
    assert gradient_differences(plain, engine) == []
    assert all(p.grad is None for p in model.parameters())


class Routed(Block):
    """Parameters that are not floating point: a table of rows, and flags."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.arange(WIDTH).flip(0), requires_grad=False)
        self.flags = nn.Parameter(torch.arange(WIDTH) % 2 == 0, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., self.rows] * self.flags


class Table(nn.Module):
    """A unit with nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.arange(2 * WIDTH, dtype=torch.uint8)[::2], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.rows)


@pytest.mark.parametrize("device", ["cpu", "lagged"])
def test_parameters_that_are_not_floating_point(device: str) -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__(Routed)
            self.table = Table()

        def hidden(self, input_ids: Tensor) -> Tensor:
            return self.table(super().hidden(input_ids))

    model = Mixed()
    assert_trains_like_plain(model, micro_batches=2, device=device).close()
    assert model.blocks[0].rows.dtype == torch.int64 and model.blocks[1].flags.dtype == torch.bool
    assert model.table.rows.tolist() == list(range(0, 2 * WIDTH, 2))
