"""A recipe compiled for chips that need not be there: memory, work, traffic, and the least time of a step."""

from tarflow_jax.planning.chips import Topology, known_chip, open_topology, prepare
from tarflow_jax.planning.flops import forward_flops
from tarflow_jax.planning.plan import Plan
from tarflow_jax.planning.program import compile_program, sample_program, student_program, train_program

__all__ = [
    "Plan",
    "Topology",
    "compile_program",
    "forward_flops",
    "known_chip",
    "open_topology",
    "prepare",
    "sample_program",
    "student_program",
    "train_program",
]
