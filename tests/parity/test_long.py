"""Random training runs against plain PyTorch, for `make test-long`; seeds are printed."""

import random

import comparison
import pytest
import torch
import zoo

RUNS = 60


@pytest.mark.long
@pytest.mark.parametrize("seed", range(RUNS))
def test_random_runs_are_equal(seed: int) -> None:
    """A named type with random lengths, micro-batches, steps, clipping and kept graphs: equal to the last bit."""
    draw = random.Random(seed)
    model_type = draw.choice(zoo.NAMED)
    lengths = [draw.randint(5, 40) for _ in range(draw.randint(1, 5))]
    options = {
        "steps": draw.randint(1, 4),
        "dropout": draw.random() < 0.5,
        "clip_norm": draw.choice([0.1, 0.5, 100.0]),
        "threads": draw.randint(1, 2),
        "keep_graphs": draw.choice(["off", "auto", 1000]),
    }
    print(f"\nseed {seed}: {model_type}, lengths {lengths}, {options}")
    plain = zoo.build(model_type, seed=seed, dropout=bool(options["dropout"]))
    mine = zoo.build(model_type, seed=seed, dropout=bool(options.pop("dropout")))

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        return [
            zoo.make_batch(plain, model_type, seed=1000 * seed + 10 * step + n, length=length, padded=n % 2 == 1)
            for n, length in enumerate(lengths)
        ]

    found = comparison.compare_models(plain, mine, batches, name=model_type, **options)
    assert found.equal, str(found)
