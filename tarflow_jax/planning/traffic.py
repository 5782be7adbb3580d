"""What a compiled program moves on each device: bytes from and to memory, and collectives by kind."""

import dataclasses
import math
import re
from collections import defaultdict

import numpy as np

from tarflow_jax.planning.hlo import Computation, Instruction, Program, arrays, executed, parse, root_of

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_NETWORK_KINDS = {"ONE_TO_ONE": "collective-permute"}  # the others are named as the collectives are
_MOVE_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "recv",
}  # fmt: skip
_ROOM = re.compile(r"[su]8\[\d+\](\{0\})?")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
_SLICES = {"dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start"}


@dataclasses.dataclass
class Collective:
    """All of a step's collectives of one kind: how many run, and the bytes that each device sends."""

    count: int = 0
    bytes: float = 0.0  # to others of its slice or host, by the algorithm that sends least
    network_bytes: float = 0.0  # to other slices or hosts


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one run of a program, on each device; loops are counted by their lengths."""

    memory_bytes: float  # read and written, but not what XLA placed in on-chip memory; of a slice, the slice
    collectives: dict[str, Collective]  # by kind


def traffic(text: str, num_devices: int, slices: int = 1, hosts: int = 1) -> Traffic:
    """Reads `compiled.as_text()` of a program for TPUs, in slices, or for GPUs, on hosts, or for a CPU.

    Raises ValueError where it does not tell a loop's length or the groups of devices.
    """
    program, entry = parse(text)
    memory = 0.0
    collectives: dict[str, Collective] = defaultdict(Collective)
    for instruction, computation, times, fused in executed(program, entry):
        siblings, kind = program[computation], instruction.opcode.removesuffix("-start")
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # as XLA writes it for TPUs: a fusion of an all-reduce and a slice
        if kind in _COLLECTIVES and not _goes_on(instruction):
            size = sum(_size(siblings, name) for name in instruction.operands)
            of_host = num_devices // hosts
            if kind == "collective-permute":
                pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes)
                across = any(int(source) // of_host != int(target) // of_host for source, target in pairs)
                sent = (0.0, size) if across else (size, 0.0)
            else:
                group = _group(instruction.attributes, num_devices // slices)
                sent = _sent(kind, size, len(group), len(set(group // of_host)))
            collectives[kind].count += times
            collectives[kind].bytes += times * sent[0]
            collectives[kind].network_bytes += times * sent[1]
        elif kind == "send":
            _add_send(collectives, instruction, _size(siblings, instruction.operands[0]), times, slices)
        if not fused:
            memory += times * _moved(program, siblings, instruction)
    return Traffic(memory, dict(collectives))


def _add_send(collectives: dict[str, Collective], send: Instruction, size: float, times: int, slices: int) -> None:
    """Between slices XLA has its runtime do the collective, and the text shows a send that names it."""
    named = re.search(r'megascale_transfer_type="(\w+)"', send.attributes)
    if named is None:
        raise ValueError(f"send {send.name} does not name its collective; expected those between TPU slices only")
    kind = _NETWORK_KINDS.get(named[1], named[1].lower().replace("_", "-"))
    sent = size if kind == "collective-permute" else _sent(kind, size, slices, slices)[1]
    collectives[kind].count += times
    collectives[kind].network_bytes += times * sent


def _sent(kind: str, size: float, group: int, hosts: int) -> tuple[float, float]:
    """Bytes that each of a group's devices must send to others of its host and to other hosts, of operands of `size`.

    Hosts exchange parts: of what a host's devices have in common, each sends a part of its own over the network.
    """
    factor = {"all-reduce": 2 / group, "all-gather": 1, "reduce-scatter": 1 / group, "all-to-all": 1 / group}
    others = (hosts - 1) * (group // hosts if kind == "all-to-all" else 1)
    return size * factor[kind] * (group - 1 - others), size * factor[kind] * others


def _group(attributes: str, devices: int) -> np.ndarray:
    """The numbers of the devices of the first group of a collective."""
    groups = re.search(r"replica_groups=(.*)", attributes)
    text = groups[1] if groups else ""
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return np.array(_numbers(listed[1]))
    if text.startswith("{}"):
        return np.arange(devices)
    if counted := re.match(rf"\[\d+,(\d+)\]<={_IOTA}", text):
        return _iota(counted[2], counted[3])[: int(counted[1])]
    # mesh['a'=32,'b'=8], device_ids=(…) {'a','b':(1)4}: named axes, or parts of them.
    if named := re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        shape = tuple(sizes.values())
        numbers = (_iota(named[2], named[3]) if named[2] else np.arange(math.prod(shape))).reshape(shape)
        chosen = dict.fromkeys(sizes, slice(1))
        for axis, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[4]):
            step = sizes[axis] // (int(before) * int(part)) if part else 1
            chosen[axis] = slice(0, step * int(part or sizes[axis]), step)
        return numbers[tuple(chosen.values())].ravel()
    raise ValueError(f"cannot read the groups of devices in {attributes[:120]!r}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """0, 1, … in an array of a shape, transposed, and flat again."""
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)).ravel() if order else numbers.ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _goes_on(instruction: Instruction) -> bool:
    """Whether it is a later piece of a collective: XLA for TPUs may run one beside the products that come after it.

    What the pieces work on is handed from one to the next, and in loops carried.
    """
    piece = _PIECE.search(instruction.attributes)
    return piece is not None and piece[1] != "-1"


def _handed_on(body: Computation, fusion: Instruction) -> tuple[set[int], set[int]]:
    """Results that a fusion around a piece of a collective leaves as they were, and operands for the piece alone."""
    pieces = [instruction for instruction in body.values() if _PIECE.search(instruction.attributes)]
    aliases = re.findall(r"\{(\d*)\}: \((\d+), ", fusion.attributes) if pieces else []
    later = [body[name] for piece in pieces if _goes_on(piece) for name in piece.operands]
    passed = {int(operand.operands[0]) for operand in later if operand.opcode == "parameter"}
    if later:
        passed |= {int(operand) for _, operand in aliases}
    return {int(result or 0) for result, _ in aliases}, passed


def _size(siblings: Computation, name: str) -> float:
    return sum(size for size, _ in arrays(siblings[name].type))


def _in_memory(type_: str) -> float:
    return sum(size for size, in_memory in arrays(type_) if in_memory)


def _moved(program: Program, siblings: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _MOVE_NOTHING or opcode.endswith("-done"):
        return 0.0
    operands = [siblings[name] for name in instruction.operands]
    if opcode == "send":  # its result is its operand
        return _in_memory(operands[0].type)
    if opcode == "fusion":
        body = program[instruction.called]
        kept, passed = _handed_on(body, instruction)
        reads = sum(_read(program, body, i, operand.type) for i, operand in enumerate(operands) if i not in passed)
        return reads + _written(body, instruction.type, kept)
    if opcode in _SLICES:
        return _slice(instruction) if _in_memory(operands[0].type) else _in_memory(instruction.type)
    if opcode == "dynamic-update-slice":
        update = _in_memory(operands[1].type)
        return update + (_size(siblings, operands[1].name) if _in_memory(instruction.type) else 0.0)
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return _in_memory(instruction.type)  # a tuple of operands and results
    if opcode == "custom-call" and "__cu" in instruction.attributes:  # their room to work is no result
        return sum(_in_memory(operand.type) for operand in operands) + _in_memory(_ROOM.sub("", instruction.type))
    return sum(_in_memory(operand.type) for operand in operands) + _in_memory(instruction.type)


def _slice(instruction: Instruction) -> float:
    """Bytes read by a slice of a buffer in memory, and written where its result is there too."""
    results = arrays(instruction.type)
    size, in_memory = results[-2] if instruction.opcode.endswith("-start") else results[0]
    return size * (2 if in_memory else 1)


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
        elif user.opcode == "bitcast" and not user.root:
            total += _used(program, body, user.name, whole)
        elif user.opcode == "fusion":
            inner, index = program[user.called], user.operands.index(name)
            parameter = _parameter(inner, index)
            # What comes out as it went in, in another shape, is read by the users of the fusion.
            if _before_bitcasts(inner, root_of(inner)).name == parameter:
                total += whole if user.root else _used(program, body, user.name, whole)
            else:
                total += _used(program, inner, parameter, whole)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return whole
    return total


def _before_bitcasts(body: Computation, result: Instruction) -> Instruction:
    """What a result is, but for its shape."""
    while result.opcode == "bitcast":
        result = body[result.operands[0]]
    return result


def _written(body: Computation, type_: str, kept: set[int]) -> float:
    """Bytes that a fusion writes, but of the results `kept` as they were: an update in place writes the update."""
    root, results = root_of(body), arrays(type_)
    roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(results)
    total = 0.0
    for i, ((size, in_memory), result) in enumerate(zip(results, roots, strict=False)):
        if i in kept:
            continue
        result = _before_bitcasts(body, result)
        update = result.opcode == "dynamic-update-slice"
        total += (_size(body, result.operands[1]) if update else size) if in_memory else 0.0
    return total
