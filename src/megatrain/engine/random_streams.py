"""Each micro-batch has a random stream of its own."""


def stream_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of one micro-batch's random stream: distinct inputs give unrelated streams (SplitMix64's finalizer)."""
    mask = (1 << 64) - 1
    value = seed & mask
    for part in (step, micro_batch):
        value = (value + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1  # torch takes signed 64 bits
