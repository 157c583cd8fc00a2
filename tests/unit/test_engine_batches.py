"""Micro-batches of one step, and the head in chunks: one loss, whatever the split."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from reference import gradient_differences, kept_gradients, plain_norm, weight_differences
from test_engine_random import tiny_llama
from test_engine_toys import Block, Net, batches_of, make_batch, make_engine, plain_trainer
from torch import Tensor, nn

import megatrain as mt
from megatrain.model.head import ChunkedHead


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


def same_length(count: int) -> list[dict[str, Tensor]]:
    """Micro-batches of one length that differ in rows and in target counts."""
    return [make_batch(n, rows=1 + n, length=8, masked=6 - 2 * n) for n in range(count)]


@pytest.mark.parametrize("make", [Net, tiny_llama])
def test_micro_batches_equal_one_big_batch(make: Any) -> None:
    plain, model = make(), make()
    engine = make_engine(model, clip_norm=1e9)
    batches = same_length(3)
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    assert len(set(counts)) == 3
    whole = plain(**joined(batches)).loss
    whole.backward()
    stats = engine.train_step(batches)
    assert stats.loss == pytest.approx(whole.item(), rel=1e-6)
    assert stats.target_tokens == sum(counts)
    assert stats.grad_norm == pytest.approx(plain_norm(plain), rel=1e-5)
    found = kept_gradients(engine)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [Net, tiny_llama])
def test_micro_batch_without_targets_contributes_nothing(make: Any) -> None:
    batches = same_length(2)
    empty = make_batch(9)
    empty["labels"].fill_(-100)
    only_first = make_batch(10)
    only_first["labels"][:, 1:] = -100  # the first label of a row is nobody's target
    results = []
    for given in ([*batches], [empty, batches[0], only_first, batches[1]]):
        engine = make_engine(make(), seed=1)
        stats = engine.train_step(given)
        results.append((stats.loss, stats.target_tokens, engine.model.state_dict()))
        assert math.isfinite(stats.loss)
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(w, results[1][2][name]) for name, w in results[0][2].items())


def test_no_target_anywhere_is_refused() -> None:
    engine = make_engine(Net())
    before = copy.deepcopy(engine.model.state_dict())
    empty = make_batch(9)
    empty["labels"].fill_(-100)
    with pytest.raises(mt.ConfigError, match=r"2 micro-batches.*-100"):
        engine.train_step([empty, empty])
    assert all(torch.equal(w, before[name]) for name, w in engine.model.state_dict().items())


@pytest.mark.parametrize(("batches", "named"), [
    ([], "empty"),
    ([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], r"batches\[0\].*labels"),
    ([make_batch(0), {}], r"batches\[1\].*labels"),
])  # fmt: skip
def test_unusable_batches_are_refused_by_number(batches: Any, named: str) -> None:
    with pytest.raises(mt.ConfigError, match=named):
        make_engine(Net()).train_step(batches)


@pytest.mark.parametrize("make", [Net, tiny_llama])
@pytest.mark.parametrize(("name", "value"), [("num_items_in_batch", 100), ("shift_labels", make_batch(0)["labels"])])
def test_what_a_step_works_out_itself_is_refused(name: str, value: Any, make: Any) -> None:
    """It would be used twice, or not at all."""
    engine = make_engine(make())
    with pytest.raises(mt.ConfigError, match=rf"batches\[1\] has {name}: train_step .* itself; leave it out"):
        engine.train_step([make_batch(0), make_batch(1) | {name: value}])
    engine.close()


def test_an_argument_of_none_is_none() -> None:
    without, given = (make_engine(tiny_llama()) for _ in range(2))
    expected = without.train_step([make_batch(0)]).loss
    assert given.train_step([make_batch(0) | {"num_items_in_batch": None, "shift_labels": None}]).loss == expected


def test_batches_are_left_as_they_were() -> None:
    batches = same_length(2)
    before = copy.deepcopy(batches)
    make_engine(tiny_llama()).train_step(batches)
    for mine, kept in zip(batches, before, strict=True):
        assert mine.keys() == kept.keys()
        assert all(torch.equal(mine[key], kept[key]) for key in kept)


def test_unit_calls_are_ordered_unit_by_unit() -> None:
    """All micro-batches pass a unit before any goes on to the next, forward and backward."""
    log: list[tuple[str, int]] = []

    class Logging(Block):
        def forward(self, x: Tensor) -> Tensor:
            log.append((self.name, x.shape[1]))
            return super().forward(x)

    model = Net(Logging, count=3)
    for number, block in enumerate(model.blocks):
        block.name = str(number)
    engine = make_engine(model, keep_graphs="off")
    batches = batches_of(0, 3)
    lengths = [b["labels"].shape[1] for b in batches]
    for step in range(2):
        log.clear()
        engine.train_step(batches)
        forward = [(str(unit), length) for unit in (0, 1, 2) for length in lengths]
        backward = [(str(unit), length) for unit in (2, 1, 0) for length in lengths]
        # in the first step the order of units is not known yet
        assert log == forward + backward or step == 0
        assert sorted(log) == sorted(forward + backward)


def test_micro_batches_that_take_different_ways() -> None:
    """One skips a block, one calls it twice: no deadlock, and each gets its own gradient."""

    class Ways(Net):
        def hidden(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            way = input_ids.shape[1] % 3
            for number, block in enumerate(self.blocks):
                if number == way:
                    continue
                x = block(x)
                if number == (way + 1) % 3:
                    x = block(x)
            return x

    plain, model = Ways(count=3), Ways(count=3)
    engine, trainer = make_engine(model), plain_trainer(plain)
    for step in range(3):
        loss = trainer.backward(batches_of(step, 3))
        stats = engine.train_step(batches_of(step, 3))
        assert stats.loss == pytest.approx(loss, rel=1e-6)
        found = kept_gradients(engine)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
        trainer.update(stats.grad_norm)


# -- the head in chunks ----------------------------------------------------------------------------------------------


def chunked_reference(plain: nn.Module, batches: list[dict[str, Tensor]], size: int) -> float:
    """Base, then head and loss per `size` tokens with its own backward; gradients add up in the engine's order."""
    total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    weight = plain.lm_head.weight
    loss, hiddens = 0.0, []
    for batch in batches:
        labels = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
        hidden = plain.model(batch["input_ids"]).last_hidden_state
        flat = hidden.detach().reshape(1, -1, hidden.shape[-1])
        gradient = torch.zeros_like(flat)
        for start in range(0, labels.numel(), size):
            part = slice(start, start + size)
            if not bool((labels[part] != -100).any()):
                continue
            leaf = flat[:, part].detach().requires_grad_()
            logits = plain.lm_head(leaf).float().view(-1, weight.shape[0])
            value = nn.functional.cross_entropy(logits, labels[part], ignore_index=-100, reduction="sum") / total
            value.backward()
            gradient[:, part] = leaf.grad
            loss += value.item()
        hiddens.append((hidden, gradient.view_as(hidden)))
    for hidden, gradient in hiddens:
        hidden.backward(gradient)
    return loss


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_many_chunks(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, whole, model = tiny_llama(), tiny_llama(), tiny_llama()
    engine, trainer = make_engine(model, head_chunk_tokens=4), plain_trainer(plain)
    assert engine.head.reason is None
    calls: list[int] = []
    original = ChunkedHead.chunk_loss

    def counting(self: ChunkedHead, hidden: Tensor, *rest: Any) -> Tensor:
        calls.append(hidden.shape[-2])
        return original(self, hidden, *rest)

    monkeypatch.setattr(ChunkedHead, "chunk_loss", counting)
    for step in range(3):
        calls.clear()
        batches = batches_of(step, micro_batches)
        whole.load_state_dict(plain.state_dict())
        whole.zero_grad()
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        unchunked = sum(whole(**b, num_items_in_batch=total).loss for b in batches)
        unchunked.backward()
        loss = chunked_reference(plain, batches, 4)
        stats = engine.train_step(batches)
        assert max(calls) <= 4 and len(calls) >= 2 * micro_batches
        assert stats.loss == pytest.approx(loss, rel=1e-12)
        assert stats.loss == pytest.approx(unchunked.item(), rel=1e-6)
        assert gradient_differences(plain, engine) == [], f"step {step}"
        found = kept_gradients(engine)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
        trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []


def test_chunks_without_targets_are_left_out() -> None:
    model = tiny_llama()
    engine = make_engine(model, head_chunk_tokens=4)
    calls: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = make_batch(0, rows=1, length=16, masked=0)
    batch["labels"][:, :13] = -100
    engine.train_step([batch])
    assert len(calls) == 2  # one token of the collecting run, and the one chunk


def test_logits_of_the_whole_batch_never_exist() -> None:
    model = tiny_llama()
    engine = make_engine(model, head_chunk_tokens=4)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[0] * out.shape[1]))
    engine.train_step([make_batch(0, rows=3, length=11)])
    assert max(rows) <= 4


def test_chunk_holds_about_16_mib_of_logits() -> None:
    engine = make_engine(tiny_llama())
    tokens = engine.head.chunk_tokens
    assert tokens % 64 == 0 and 8 * 2**20 < tokens * 61 * 4 <= 16 * 2**20


def soft_capped(kind: str) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.05,
        "sliding_window": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, attn_implementation="eager"))
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_soft_capped_logits(kind: str, chunk: int) -> None:
    plain, model = soft_capped(kind), soft_capped(kind)
    engine = make_engine(model, head_chunk_tokens=chunk)
    assert engine.head.reason is None
    batch = make_batch(0, rows=2, length=9)
    loss = plain(**batch).loss
    loss.backward()
    uncapped = copy.deepcopy(plain)
    uncapped.config.final_logit_softcapping = None
    assert abs(uncapped(**batch).loss.item() - loss.item()) > 1e-4  # the cap does bite
    stats = engine.train_step([batch])
    assert stats.loss == pytest.approx(loss.item(), rel=1e-6)
    found = kept_gradients(engine)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-7)
        if chunk > 18:
            assert torch.equal(found[name], parameter.grad), name


def own_loss_model() -> nn.Module:
    """A causal model whose loss is not a sum over tokens of its loss function."""
    from transformers import LlamaForCausalLM

    class Focal(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None, **rest: Any) -> Any:
            output = super().forward(input_ids=input_ids, labels=labels, **rest)
            if labels is not None:
                output.loss = output.loss + output.logits.square().mean() * output.loss
            return output

    model = tiny_llama()
    model.__class__ = Focal
    return model


def test_inseparable_loss_falls_back_to_whole_logits_with_one_warning() -> None:
    plain, model = own_loss_model(), own_loss_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine, trainer = make_engine(model), plain_trainer(plain)
        assert isinstance(engine.head.reason, str)
        for step in range(3):
            batches = batches_of(step, 2)
            loss = trainer.backward(batches)
            stats = engine.train_step(batches)
            assert stats.loss == loss
            trainer.update(stats.grad_norm)
    assert weight_differences(plain, engine) == []
    about = [str(w.message) for w in caught if "logits" in str(w.message)]
    assert len(about) == 1 and engine.head.reason in about[0]


def test_separable_loss_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = make_engine(tiny_llama())
        engine.train_step(batches_of(0, 2))
    assert engine.head.reason is None
    assert [str(w.message) for w in caught] == []


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.1,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("make", [encoder_decoder, classifier])
def test_other_kinds_of_model_run_with_their_own_loss(make: Any) -> None:
    plain, model = make().train(), make().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, trainer = make_engine(model), plain_trainer(plain)
    for step in range(2):
        batches = batches_of(step, 1)
        if make is classifier:
            for batch in batches:
                batch["labels"] = batch["labels"][:, 0].remainder(3)
        loss = trainer.backward(batches, engine.shifts_labels)
        stats = engine.train_step(batches)
        assert stats.loss == loss
        # T5's position biases of the first block reach every later one: a sum of several parts
        found = kept_gradients(engine)
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
        trainer.update(stats.grad_norm)


def test_all_labels_count_where_the_model_does_not_shift() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = make_engine(encoder_decoder())
    batch = make_batch(0, masked=2)
    assert engine.train_step([batch]).target_tokens == int((batch["labels"] != -100).sum())


def test_classification_targets_are_rows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = make_engine(classifier().eval())
    batches = [make_batch(n, rows=1 + n) for n in range(3)]
    for batch in batches:
        batch["labels"] = batch["labels"][:, 0].remainder(3)
    whole = classifier().eval()
    total = sum(
        whole(**b).loss * b["labels"].numel() for b in batches
    ) / sum(b["labels"].numel() for b in batches)  # fmt: skip
    stats = engine.train_step(batches)
    assert stats.target_tokens == 6
    assert stats.loss == pytest.approx(total.item(), rel=1e-6)


def test_keep_graphs_settings_give_the_same_bits() -> None:
    results = []
    for setting in ("off", "auto", 1, 100):
        engine = make_engine(tiny_llama(), keep_graphs=setting)
        losses = [engine.train_step(batches_of(step, 2)).loss for step in range(3)]
        results.append((losses, copy.deepcopy(engine.model.state_dict())))
    for losses, weights in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(w, results[0][1][name]) for name, w in weights.items())
    for wrong in ("some", -1, True, 1.5):
        with pytest.raises(mt.ConfigError, match="keep_graphs"):
            make_engine(Net(), keep_graphs=wrong)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_train_step_takes_gradients_whatever_the_callers_mode(micro_batches: int) -> None:
    expected = make_engine(Net()).train_step(batches_of(0, micro_batches))
    with torch.no_grad():
        stats = make_engine(Net()).train_step(batches_of(0, micro_batches))
        assert not torch.is_grad_enabled()
    assert (stats.loss, stats.grad_norm) == (expected.loss, expected.grad_norm)
