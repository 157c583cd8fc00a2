"""What arXiv 2604.05091 reports, and which of our results shows the same.

`read_in`: its abstract, its repository, or public reviews that transcribe its tables, which nobody here has held
against the paper itself.
"""

from dataclasses import dataclass

REVIEWS = "reviews"


@dataclass(frozen=True, slots=True)
class Claim:
    """`shown_by`: part, how its case ends, metric."""

    what: str
    value: str
    hardware: str
    read_in: str
    shown_by: tuple[str, str, str] | None = None


CLAIMS = (
    Claim("largest model", "120B (a mixture of experts, some 5B active)", "H200, 1.5 TB host", "abstract"),
    Claim("14B, speed", "264 TFLOP/s", "GH200", REVIEWS, ("rivals", ": megatrain", "model_rate")),
    Claim(
        "14B, beside ZeRO-3 with CPU offload",
        "1.84x",
        "GH200",
        "abstract",
        ("rivals", ": megatrain", "speed_of_zero3-offload"),
    ),
    Claim("7B, longest context", "512K tokens", "GH200", "abstract"),
    Claim(
        "without double buffering",
        "266.3 to 182.9 TFLOP/s (0.69x)",
        "GH200",
        REVIEWS,
        ("ablation", ": no prefetch", "speed_of_all_parts"),
    ),
    Claim(
        "28 to 180 layers, one width",
        "284 to 227 TFLOP/s (0.80x)",
        "GH200",
        REVIEWS,
        ("depth", ": 180 layers", "rate_of_first"),
    ),
    Claim(
        "width 1x to 3x",
        "406 to 264 TFLOP/s (0.65x)",
        "GH200",
        REVIEWS,
        ("width", ": width 3x", "rate_of_first"),
    ),
    Claim("14B on a card of 48 GB", "56.8 TFLOP/s", "RTX A6000, 251 GB host", REVIEWS),
    Claim("14B on a card of 24 GB", "30.2 TFLOP/s", "RTX 3090, 251 GB host", REVIEWS),
    Claim("7B, MetaMathQA, exact match", "88.99 (ZeRO-3: 88.93)", "GH200", REVIEWS),
    Claim("14B, MetaMathQA, exact match", "92.52 (ZeRO-3: 92.41)", "GH200", REVIEWS),
    Claim("7B on four GPUs", "1290 TFLOP/s (272 on one)", "4 x H100", "its repository"),
)
