"""Learning rates against values worked out by hand."""

import pytest

from megatrain.optim.schedules import learning_rate


def test_warmup_rises_evenly_and_reaches_the_peak_in_its_last_step() -> None:
    rates = [learning_rate(step, peak=1.0, name="cosine", total_steps=10, warmup_steps=4) for step in range(5)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0  # the decay starts from the peak, too


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.775, 0.55, 0.325]),
        # 0.1 + 0.9 * (1 + cos(pi * k / 4)) / 2
        ("cosine", [1.0, 0.8681980515339464, 0.55, 0.23180194846605365]),
    ],
)
def test_shapes_without_warmup(name: str, expected: list[float]) -> None:
    rates = [learning_rate(step, peak=1.0, name=name, total_steps=4, min_ratio=0.1) for step in range(4)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_wsd_is_flat_and_then_linear_over_the_last_fifth() -> None:
    rates = [learning_rate(step, peak=2.0, name="wsd", total_steps=20, warmup_steps=2) for step in range(20)]
    assert rates[:2] == [1.0, 2.0]
    assert rates[2:17] == [2.0] * 15
    assert rates[17:] == pytest.approx([1.5, 1.0, 0.5])


def test_after_the_end_the_rate_stays_at_its_minimum() -> None:
    for name in ("linear", "cosine", "wsd"):
        assert learning_rate(99, peak=1.0, name=name, total_steps=10, min_ratio=0.1) == pytest.approx(0.1)


def test_only_warmup_and_an_unknown_name() -> None:
    assert learning_rate(1, peak=1.0, name="wsd", total_steps=2, warmup_steps=2) == 1.0
    with pytest.raises(ValueError, match="cosin"):
        learning_rate(0, peak=1.0, name="cosin", total_steps=2)
