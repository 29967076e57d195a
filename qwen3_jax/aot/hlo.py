"""Parses the text of a scheduled HLO module, `compiled.as_text()`.

A module is a set of computations. A computation is a list of instructions in the order in which they run:

    %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %x), kind=kOutput, calls=%fused, backend_config={...}

The parts of a line are the name, the type (element type, dimensions, and the layout with its tiles and memory space),
the operation, its operands and its attributes. `cost` says what an instruction costs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

HBM, VMEM = 0, 1  # memory spaces; the others are host memory, scalar memory and flags

_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
# Where a header or an instruction begins. Other line breaks are inside of attributes.
_BREAK = re.compile(r"\n(?=  (?:ROOT )?%|(?:ENTRY )?%[\w.\-]+ \(.*\{\n)")

_SUMS = ("add", "copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")  # of one or several operands
_CONSTANT = -1
_Sum = Counter[int]  # the coefficient of each element of a loop's state by its number; under _CONSTANT the constant


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a type. `bytes` counts its elements, without the padding of tiles."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @functools.cached_property
    def bytes(self) -> float:
        return math.prod(self.dims) * _bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """operands: names of instructions in the same computation. arguments: the text between the parentheses, such as a
    constant's value or a parameter's number. root: whether it is the result of its computation."""

    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays in its type; nested tuples are flattened in order."""
        found = []
        for dtype, dims, layout in _ARRAY.findall(self.type):
            space = re.search(r"S\((\d+)\)", layout)
            found.append(Array(dtype, _ints(dims), int(space[1]) if space else HBM))
        return tuple(found)

    @functools.cached_property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of its first array."""
        return self.arrays[0].dims

    @property
    def space(self) -> int:
        """The memory space of its first array."""
        return self.arrays[0].space if self.arrays else HBM

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes, None if it does not match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def computation(self, *keys: str) -> str:
        """The name of the computation that the first of these attributes gives."""
        name = self.attribute(rf"\b(?:{'|'.join(keys)})=%?([\w.\-]+)")
        assert name is not None, f"{self.name} has none of {keys}"
        return name

    @property
    def branches(self) -> list[str]:
        """The names of a conditional's computations."""
        named = self.attribute(r"\b(branch_computations=\{[^}]*|true_computation=\S+ false_computation=\S+)")
        assert named is not None, f"{self.name} has no branches"
        return _NAME.findall(named)

    @property
    def op_name(self) -> str:
        """Its place in the Python program, for instance jit(step)/transpose(jvp(Qwen3))/dot_general; may be empty."""
        return self.attribute(r'\bop_name="([^"]*)"') or ""

    def replica_group(self) -> list[int]:
        """The devices of a collective's first group; empty if the text lists none: one group of all devices.

        XLA writes groups in three forms, and which one depends on its version:
        - {{0,1},{2,3}}, lists;
        - [2,2]<=[4], an iota: groups x devices of range(4), reshaped and perhaps transposed, T(1,0);
        - mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}: axes of a mesh, and perhaps the iota of its devices.

        Raises:
          ValueError: another form.
        """
        groups = self.attribute(r"\breplica_groups=(.*)") or "{}"
        if groups.startswith("{}"):
            return []
        if listed := re.match(r"\{\{([\d,]*)\}", groups):
            return list(_ints(listed[1]))
        if iota := re.match(rf"\[([\d,]+)\]<={_IOTA}", groups):
            return _iota(iota[2], iota[3])[: _ints(iota[1])[-1]].tolist()
        mesh = re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}", groups)
        if mesh is None:
            raise ValueError(f"replica_groups: {groups[:200]!r} cannot be read; lists, iotas and meshes can")
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        positions = np.zeros(1, int)
        for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[4]):
            size = int(part or sizes[axis])  # 'x':(2)4 is the axis of 4 in 'x' split into 2 x 4 x rest
            rest = sizes[axis] // (size * int(before or 1))
            stride = math.prod(list(sizes.values())[list(sizes).index(axis) + 1 :])
            positions = np.add.outer(positions, np.arange(size) * rest * stride).ravel()
        return (_iota(mesh[2], mesh[3])[positions] if mesh[2] else positions).tolist()


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they run."""

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.root)

    @functools.cached_property
    def results(self) -> list[Instruction]:
        """The root, or the elements of its tuple."""
        return [self[name] for name in self.root.operands] if self.root.op == "tuple" else [self.root]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        return sorted((i for i in self.values() if i.op == "parameter"), key=lambda i: int(i.arguments))

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """For each instruction its users, each with the number of the operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in self}
        for i in self.values():
            for k, name in enumerate(i.operands):
                found[name].append((i, k))
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """entry: the name of the computation that runs first. partitions: the number of devices."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def called(self, i: Instruction, *keys: str) -> Computation:
        """The computation that the first of these attributes gives; without keys, that of a fusion or a call."""
        return self.computations[i.computation(*keys or ("calls", "to_apply"))]

    def trip_count(self, scope: Computation, loop: Instruction) -> int | None:
        """The number of trips of a `while` in computation `scope`; None if it depends on data.

        The condition compares sums of constants and elements of the loop's state; the body adds constants to elements.
        Initial values are read from the operand. That of an element which changes is taken as 0 if it is not constant.
        """
        condition = self.called(loop, "condition")
        body = self.called(loop, "body")
        test, arguments = condition.root, None
        if test.op == "fusion":
            arguments = [self._sum(condition, name) for name in test.operands]
            condition = self.called(test)
            test = condition.root
        if test.op != "compare":
            return None
        left, right = (self._sum(condition, name, arguments) for name in test.operands)
        if left is None or right is None:
            return None
        direction = test.attribute(r"direction=(\w+)")
        if direction in ("GT", "GE"):
            left, right = right, left
        distance = Counter(right)  # to the end of the loop; its value before the first trip, and its change in each
        distance.subtract(left)
        first, step = distance.pop(_CONSTANT, 0) + (direction in ("LE", "GE")), 0
        for element, factor in distance.items():
            start = self._constant(scope, scope[loop.operands[0]], element)
            change = self._constant(body, body.root, element, less=[element]) or 0
            if start is None and not change:
                return None
            first += factor * (start or 0)
            step += factor * change
        return max(0, math.ceil(first / -step)) if step else None

    def _constant(self, scope: Computation, state: Instruction, element: int, less: Sequence[int] = ()) -> int | None:
        """The value of an element of a tuple, less these elements of the loop's state; None if it is not constant."""
        total = self._sum(scope, state.operands[element]) if state.op == "tuple" else None
        if total is None:
            return None
        total.subtract(less)
        return total[_CONSTANT] if total == Counter({_CONSTANT: total[_CONSTANT]}) else None

    def _sum(self, scope: Computation, name: str, arguments: Sequence[_Sum | None] | None = None) -> _Sum | None:
        """An integer as a sum of constants and elements of the computation's one parameter, a tuple. None if it is
        anything else. `arguments` are the values of a fused computation's parameters."""
        i, index = scope[name], 0
        if i.op == "get-tuple-element":
            i, index = scope[i.operands[0]], int(i.attribute(r"\bindex=(\d+)") or 0)
            if i.op == "parameter" and arguments is None:
                return Counter({index: 1})
        if i.op == "constant":
            return Counter({_CONSTANT: int(i.arguments)}) if re.fullmatch(r"-?\d+", i.arguments) else None
        if i.op == "parameter":
            return arguments[int(i.arguments)] if arguments is not None else None
        if i.op not in ("fusion", *_SUMS):
            return None
        given = [self._sum(scope, operand, arguments) for operand in i.operands]
        if i.op == "fusion":
            fused = self.called(i)
            return self._sum(fused, fused.results[index].name, given) if index < len(fused.results) else None
        total: _Sum = Counter()
        for part in given:
            if part is None:
                return None
            total.update(part)
        return total


def read_program(text: str) -> Program:
    """Parses a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    for piece in _BREAK.split(text):
        if header := _HEADER.match(piece):
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(piece):
            root, name, kind, op = found.groups()
            arguments, _, attributes = piece[found.end() :].partition(")")
            operands = tuple(_NAME.findall(arguments))
            current[name] = Instruction(name, op, kind, operands, arguments, attributes, bool(root))
    if not entry:
        raise ValueError("text: it has no ENTRY computation; pass the text of a compiled program")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.index("\n")])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


@functools.cache
def _bits(dtype: str) -> int:
    """Bits of an element: the first number in the type's name, as in f8e4m3fn."""
    size = re.search(r"\d+", dtype)
    return 8 if dtype == "pred" else int(size[0]) if size else 0


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """range(n) reshaped to `sizes`, transposed to `order`, flattened."""
    shape = _ints(sizes)
    return np.arange(math.prod(shape)).reshape(shape).transpose(_ints(order or "") or range(len(shape))).ravel()
