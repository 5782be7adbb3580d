"""Counts the bytes that a compiled program moves through main memory, from its HLO text, for a roofline lower bound.

    python -m benchmarks.hlo_traffic imagenet64_cond --topology=v5e:4x4 --config.mesh.data=1 --config.mesh.fsdp=16
    python -m benchmarks.hlo_traffic imagenet64_cond --topology=h100:8 --sampler

For work on kernels and meshes: prints what collectives send, the bound on the program's time, and the instructions that
move most. Not checked on a device. The parser follows the HLO text of jax 0.10.2 for TPUs, GPUs and CPUs; that of
other versions may differ.
"""

import argparse
import ast
import importlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.collectives import collectives
from tarflow_jax.planning import Topology, open_topology, prepare
from tarflow_jax.planning.flops import program_flops
from tarflow_jax.planning.plan import trace
from tarflow_jax.training import Recipe

# Bytes/s by the start of `jax.Device.device_kind`, longer ones first: of main memory, and to chips of the same slice or
# GPUs of the same host by all links together, one way. Sources as of tarflow_jax/planning/topology.py.
RATES = {
    "TPU v5 lite": (819e9, 200e9),
    "TPU v5": (2765e9, 600e9),
    "TPU v6 lite": (1640e9, 400e9),
    "NVIDIA A100": (2039e9, 300e9),
    "NVIDIA H100": (3350e9, 450e9),
    "NVIDIA H200": (4800e9, 450e9),
    "NVIDIA B200": (8000e9, 900e9),
}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*?)\)(.*)$")
_CALLED = re.compile(r"\b(?:body|calls|to_apply|called_computations|branch_computations)=\{?%?([\w.-]+)")
_MOVE_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "recv",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"}
_WORKSPACE = re.compile(r"[su]8\[\d+\](\{0\})?")
_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')


class Instruction(NamedTuple):
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter its number, of a constant its value
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]
Program = dict[str, Computation]


def traffic(text: str) -> dict[str, float]:
    """Returns the bytes that instructions of `compiled.as_text()` read and write, by "opcode name"; loops count whole.

    What XLA placed in on-chip memory costs nothing, a slice costs the slice, tiles' padding is not counted.
    """
    program, entry = parse(text)
    moved: dict[str, float] = {}
    for instruction, siblings, times in _executed(program, entry):
        size = times * _moved(program, siblings, instruction)
        if size:
            key = f"{instruction.opcode} {instruction.name}"
            moved[key] = moved.get(key, 0.0) + size
    return moved


def roofline(traced: Any, text: str, topology: Topology, num_slices: int = 1) -> dict[str, float]:
    """Returns the seconds that matmuls, memory and links take at data-sheet rates; the longest bounds the program's."""
    kind, count = topology.devices[0].device_kind, len(topology.devices)
    memory_rate, link_rate = next(rates for name, rates in RATES.items() if kind.startswith(name))
    sent = collectives(text, count, num_slices)
    return {
        "matmuls": program_flops(traced.jaxpr) / count / topology.chip.flops,
        "memory": sum(traffic(text).values()) / memory_rate,
        "links": sum(found.bytes for kind, found in sent.items() if not kind.endswith("slices")) / link_rate,
    }


def compiled_text(recipe: Recipe, topology: Topology, sampler: bool) -> tuple[Any, str]:
    """Returns `jax.jit`'s trace of a recipe's program, and the text that it compiles to."""
    traced, _ = trace(recipe, recipe.mesh(topology.devices), sampler)
    return traced, traced.lower().compile().as_text()


def parse(text: str) -> tuple[Program, str]:
    """Returns the computations of `compiled.as_text()` and the name of the entry."""
    program: Program = {}
    entry = computation = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            computation = header[2]
            program[computation] = {}
            entry = computation if header[1] else entry
        elif found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            root, name, type_, opcode, operands, attributes = found.groups()
            names = tuple(re.findall(r"[\w.-]+", operands))
            program[computation][name] = Instruction(name, type_, opcode, names, attributes, bool(root))
    return program, entry


def _executed(program: Program, name: str, times: int = 1) -> Iterator[tuple[Instruction, Computation, int]]:
    """Yields what runs outside fusions: instructions, their computations, and how often they run."""
    for instruction in program[name].values():
        yield instruction, program[name], times
        if instruction.opcode == "while":
            yield from _executed(program, _called(instruction), times * _trip_count(program, instruction))
        elif instruction.opcode in ("call", "async-start", "conditional"):
            yield from _executed(program, _called(instruction), times)


def _called(instruction: Instruction) -> str:
    """The computation that runs; a conditional's first (its branches do the same work, each on another slice)."""
    return _CALLED.findall(instruction.attributes)[0]


def _trip_count(program: Program, loop: Instruction) -> int:
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = program[re.findall(r"condition=%?([\w.-]+)", loop.attributes)[0]]
    bound = condition[_root(condition).operands[-1]]
    if "direction=LT" not in _root(condition).attributes or bound.opcode != "constant":
        raise ValueError(f"the text does not give the length of loop {loop.name}")
    return int(bound.operands[0])


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _arrays(type_: str) -> list[tuple[float, bool]]:
    """The bytes of each array of a type, and whether it is in main memory."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_):
        width = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(width[0]) if width else 0  # a token has none
        size = math.prod(int(n) for n in dims.split(",") if n) * bits / 8
        found.append((size, re.search(r"S\([1-9]", layout) is None))
    return found


def _size(computation: Computation, name: str) -> float:
    return sum(size for size, _ in _arrays(computation[name].type))


def _in_memory(type_: str) -> float:
    return sum(size for size, in_memory in _arrays(type_) if in_memory)


def _moved(program: Program, siblings: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _MOVE_NOTHING or opcode.endswith("-done"):
        return 0.0
    operands = [siblings[name] for name in instruction.operands]
    if opcode == "send":  # its result is its operand
        return _in_memory(operands[0].type)
    if opcode == "fusion":
        body = program[_called(instruction)]
        kept, passed = _handed_on(body, instruction)
        reads = sum(_read(program, body, i, operand.type) for i, operand in enumerate(operands) if i not in passed)
        return reads + _written(body, instruction.type, kept)
    if opcode in _SLICES:
        if not _in_memory(operands[0].type):
            return _in_memory(instruction.type)
        results = _arrays(instruction.type)
        size, in_memory = results[-2] if opcode.endswith("-start") else results[0]
        return size * (2 if in_memory else 1)  # read, and written unless the result is on the chip
    if opcode == "dynamic-update-slice":
        update = _in_memory(operands[1].type)
        return update + (_size(siblings, operands[1].name) if _in_memory(instruction.type) else 0.0)
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return _in_memory(instruction.type)  # a tuple of operands and results
    if opcode == "custom-call" and "__cu" in instruction.attributes:  # cuDNN's and cuBLAS's workspace is not a result
        return sum(_in_memory(o.type) for o in operands) + _in_memory(_WORKSPACE.sub("", instruction.type))
    return sum(_in_memory(operand.type) for operand in operands) + _in_memory(instruction.type)


def _handed_on(body: Computation, fusion: Instruction) -> tuple[set[int], set[int]]:
    """Results that a fusion leaves as they were, and operands that it hands on, around a piece of a collective.

    A TPU may run a collective in pieces beside matmuls: each later piece takes what the one before returned.
    """
    pieces = [instruction for instruction in body.values() if _PIECE.search(instruction.attributes)]
    aliases = re.findall(r"\{(\d*)\}: \((\d+), ", fusion.attributes) if pieces else []
    later = [piece for piece in pieces if _PIECE.findall(piece.attributes) != ["-1"]]
    inputs = [body[name] for piece in later for name in piece.operands]
    passed = {int(operand.operands[0]) for operand in inputs if operand.opcode == "parameter"}
    if inputs:
        passed |= {int(operand) for _, operand in aliases}
    return {int(result or 0) for result, _ in aliases}, passed


def _read(program: Program, body: Computation, index: int, type_: str) -> float:
    """Bytes that a fusion reads of its operand number `index`."""
    whole = _in_memory(type_)
    return min(whole, _used(program, body, _parameter(body, index), whole)) if whole else 0.0


def _parameter(body: Computation, index: int) -> str:
    return next(i.name for i in body.values() if i.opcode == "parameter" and i.operands == (str(index),))


def _used(program: Program, body: Computation, name: str, whole: float) -> float:
    total = 0.0
    for user in body.values():
        if user.opcode in ("parameter", "constant") or name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += _size(body, user.name)
        elif user.opcode == "bitcast" and not user.is_root:
            total += _used(program, body, user.name, whole)
        elif user.opcode == "fusion":
            inner, index = program[_called(user)], user.operands.index(name)
            parameter = _parameter(inner, index)
            # What leaves the inner fusion in another shape only is read by the fusion's users.
            if _before_bitcasts(inner, _root(inner)).name == parameter:
                total += whole if user.is_root else _used(program, body, user.name, whole)
            else:
                total += _used(program, inner, parameter, whole)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return whole
    return total


def _before_bitcasts(body: Computation, result: Instruction) -> Instruction:
    while result.opcode == "bitcast":
        result = body[result.operands[0]]
    return result


def _written(body: Computation, type_: str, kept: set[int]) -> float:
    """Bytes that a fusion writes, except for results `kept` as they were; an update in place writes the update."""
    root, results = _root(body), _arrays(type_)
    roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(results)
    total = 0.0
    for i, ((size, in_memory), result) in enumerate(zip(results, roots, strict=False)):
        if i in kept or not in_memory:
            continue
        result = _before_bitcasts(body, result)
        total += _size(body, result.operands[1]) if result.opcode == "dynamic-update-slice" else size
    return total


def main() -> None:
    """Compiles a recipe and prints its bound and its dearest instructions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a module of configs, such as imagenet64_cond")
    parser.add_argument("--topology", required=True, help="such as v5e:4x4 or h100:8")
    parser.add_argument("--num_slices", type=int, default=1, help="TPU slices")
    parser.add_argument("--sampler", action="store_true", help="the sequential decoder, not the training step")
    parser.add_argument("--top", type=int, default=20, help="instructions to print")
    args, others = parser.parse_known_args()
    config = importlib.import_module(f"configs.{args.recipe}").get_config()
    for flag in others:
        name, _, value = flag.removeprefix("--config.").partition("=")
        number = re.fullmatch(r"-?[\d.]+|True|False", value)
        config.update_from_flattened_dict({name: ast.literal_eval(value) if number else value})
    prepare(args.topology)
    topology = open_topology(args.topology, args.num_slices)
    traced, text = compiled_text(Recipe(config), topology, args.sampler)
    moved = traffic(text)
    bound = roofline(traced, text, topology, args.num_slices)
    print(f"{sum(moved.values()) / 1e9:,.2f} GB moved")
    for kind, collective in sorted(collectives(text, len(topology.devices), args.num_slices).items()):
        print(f"{kind:<26} {collective.count:,} times, {collective.bytes / 1e6:,.1f} MB sent")
    print("ms at least:", ", ".join(f"{name} {seconds * 1e3:.4g}" for name, seconds in bound.items()))
    for name in sorted(moved, key=lambda name: -moved[name])[: args.top]:
        print(f"{moved[name] / 1e9:10.3f} GB  {name}")


if __name__ == "__main__":
    main()
