"""The text of a compiled program, parsed: computations, their instructions, and how often each one runs."""

import dataclasses
import math
import re
from collections.abc import Iterator

Program = dict[str, "Computation"]

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations|branch_computations)=\{?(%[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def attribute(self, name: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        if found is None:
            raise ValueError(f"{self.opcode} {self.name} has no {name}; expected a compiled program's text")
        return found[1]

    @property
    def called(self) -> str:
        """The computation that runs; a conditional's first (its branches are one for each slice, and alike)."""
        return _CALLED.findall(self.attributes)[0].removeprefix("%")


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[Program, str]:
    """Computations by name, and the name of the entry, of `compiled.as_text()`; ValueError for any other text."""
    program: Program = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = program[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith(" ") and " = " in line:
            instruction = _instruction(re.sub(r"/\*.*?\*/", "", line))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; expected a compiled program's as_text()")
    return program, entry


def root_of(computation: Computation) -> Instruction:
    """The instruction whose result is the computation's."""
    return next(instruction for instruction in computation.values() if instruction.root)


def executed(
    program: Program, name: str, times: int = 1, fused: bool = False
) -> Iterator[tuple[Instruction, str, int, bool]]:
    """(instruction, its computation's name, how often it runs, whether inside a fusion) of all that runs.

    Raises ValueError for a loop whose length the text does not tell.
    """
    for instruction in program[name].values():
        yield instruction, name, times, fused
        if instruction.opcode == "while":
            trips = times * _trips(program, instruction)
            yield from executed(program, instruction.attribute("body"), trips, fused)
        elif instruction.opcode in ("fusion", "call", "async-start", "conditional"):
            inside = fused or instruction.opcode == "fusion"
            yield from executed(program, instruction.called, times, inside)


def arrays(type_: str) -> list[tuple[float, bool]]:
    """(bytes without the padding of tiles, whether in the device's main memory) of each array of a type."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(type_):
        width = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(width[0]) if width else 0  # a token has none
        size = math.prod(int(n) for n in dims.split(",") if n) * bits / 8
        found.append((size, re.search(r"S\([1-9]", layout) is None))
    return found


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().split(" = ", 1)
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    opcode, end = rest[:opening], _closing(rest, opening)
    inside = rest[opening + 1 : end - 1]
    literal = opcode in ("constant", "parameter")
    operands = (inside,) if literal else tuple(re.findall(r"%([\w.-]+)", inside))
    bare = name.removeprefix("ROOT ").removeprefix("%")
    return Instruction(bare, type_, opcode, operands, rest[end:], name.startswith("ROOT "))


def _closing(text: str, opening: int) -> int:
    """The index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"unclosed parenthesis in {text[:80]!r}")


def _trips(program: Program, loop: Instruction) -> int:
    if told := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(told[1])
    # A scan counts from 0 while it is less than a constant.
    condition = program[loop.attribute("condition")]
    root = root_of(condition)
    bound = condition.get(root.operands[-1])
    if root.opcode == "compare" and "direction=LT" in root.attributes and bound and bound.opcode == "constant":
        return int(bound.operands[0])
    raise ValueError(f"the length of loop {loop.name} cannot be read from its condition {root}")
