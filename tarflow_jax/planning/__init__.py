"""Compiles a recipe for devices that need not be present: the memory and the matmuls of a step or a sampler."""

from tarflow_jax.planning.flops import forward_flops
from tarflow_jax.planning.plan import Plan, make_plan
from tarflow_jax.planning.topology import Topology, known_chip, open_topology, prepare

__all__ = ["Plan", "Topology", "forward_flops", "known_chip", "make_plan", "open_topology", "prepare"]
