"""All systems by name, ours first."""

from rivals.fsdp2 import Fsdp2
from rivals.interface import System
from rivals.original import Original
from rivals.ours import Ours
from rivals.resident import Resident
from rivals.slideformer import SlideFormer
from rivals.zero3 import Zero3

OURS = "megatrain"
BASELINE = "torch"
SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        Ours(OURS),
        Ours("megatrain-recomputing", keep_graphs="off"),
        Resident(),
        Fsdp2(),
        Zero3("zero3-offload", super_offload=False),
        Zero3("zero3-superoffload", super_offload=True),
        Original(),
        SlideFormer(),
    )
}
