"""Counts the bytes that a program's collectives send, from its compiled text."""

import dataclasses
import math
import re
from collections import defaultdict

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*?)\)(.*)$", re.MULTILINE)
_CALLED = re.compile(r"\b(?:body|calls|to_apply|called_computations|branch_computations)=\{?%?([\w.-]+)")
# A TPU may overlap pieces of a collective with matmuls. Every piece but the first has a flag_start other than -1.
_LATER_PIECE = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(?!-1)')


@dataclasses.dataclass
class Collective:
    """All collectives of one kind in a program: how many run, and the bytes that each device sends."""

    count: int = 0
    bytes: float = 0.0


def collectives(text: str, num_devices: int, num_slices: int = 1) -> dict[str, Collective]:
    """Returns the collectives of `compiled.as_text()` by kind, with the fewest bytes that they can send.

    Loops count by their trip counts. Collectives between TPU slices are separate kinds, "all-reduce between slices".
    Raises ValueError if the text does not give a loop's trip count.
    """
    parsed = _COMPUTATION.findall(text)
    computations = {name: body for _, name, body in parsed}
    sizes = {name: _num_bytes(type_) for name, type_, *_ in _INSTRUCTION.findall(text)}
    totals: dict[str, Collective] = defaultdict(Collective)

    def visit(computation: str, times: int) -> None:
        for _, _, opcode, operands, attributes in _INSTRUCTION.findall(computations[computation]):
            if opcode in ("while", "fusion", "call", "async-start", "conditional"):
                # The branches of a conditional do the same work, each on another slice.
                rounds = _trip_count(attributes, computations) if opcode == "while" else 1
                visit(_CALLED.findall(attributes)[0], times * rounds)
            kind, suffix, group = opcode.removesuffix("-start"), "", _group_size(attributes, num_devices // num_slices)
            transfer = re.search(r'megascale_transfer_type="(\w+)"', attributes)
            if kind == "send" and transfer:  # the TPU's runtime performs the collective
                kind = transfer[1].lower().replace("_", "-").replace("one-to-one", "collective-permute")
                suffix, group = " between slices", num_slices
            elif kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # on TPUs, a fusion of an all-reduce and a slice
            if kind in _KINDS and not _LATER_PIECE.search(attributes):
                share = {"all-gather": group - 1, "all-reduce": 2 * (group - 1) / group, "collective-permute": 1}
                size = sum(sizes[name] for name in re.findall(r"%([\w.-]+)", operands))
                totals[kind + suffix].count += times
                totals[kind + suffix].bytes += times * size * share.get(kind, (group - 1) / group)

    visit(next(name for entry, name, _ in parsed if entry), 1)
    return dict(totals)


def _num_bytes(type_: str) -> float:
    """Returns the bytes of a type's arrays together, without the padding of tiles; tokens have none."""
    total = 0.0
    for dtype, width, dims in re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", type_):
        bits = 8 if dtype == "pred" else int(width or 0)
        total += bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _group_size(attributes: str, num_devices: int) -> int:
    """Returns the number of devices that exchange data with each other."""
    text = attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if iota := re.match(r"\[\d+,(\d+)\]<=", text):
        return int(iota[1])
    # mesh['a'=32,'b'=8], device_ids=(…) {'a','b':(1)4}: along axes, or parts of them.
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return num_devices


def _trip_count(loop: str, computations: dict[str, str]) -> int:
    """Returns the trip count of a loop, from its attributes."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    # On TPUs, the text has only the condition: a counter from 0 is less than a constant.
    condition = computations[re.findall(r"condition=%?([\w.-]+)", loop)[0]]
    bounds = re.findall(r" constant\((\d+)\)", condition)
    if len(bounds) != 1 or "direction=LT" not in condition:
        raise ValueError(f"the text of a program does not give the length of a loop: {condition.strip()!r}")
    return int(bounds[0])
