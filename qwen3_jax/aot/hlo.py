"""Parses the text of a scheduled HLO module, `compiled.as_text()`.

A module is a set of computations. A computation is a list of instructions in the order in which they run:

    %y = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %x), kind=kOutput, calls=%fused, backend_config={...}

The parts of a line are the name, the type (element type, dimensions, and the layout with its tiles and memory space),
the operation, its operands and its attributes. `cost` says what an instruction costs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence

HBM, VMEM = 0, 1  # memory spaces; the others are host memory, scalar memory and flags

_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


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
        listed = self.attribute(r"\bbranch_computations=\{([^}]*)\}")
        if listed is not None:
            return _NAME.findall(listed)
        return [self.computation("true_computation"), self.computation("false_computation")]

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
        listed = self.attribute(r"\breplica_groups=\{\{([\d,]*)\}")
        if listed is not None:
            return list(_ints(listed))
        iota = re.search(r"\breplica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", self.attributes)
        if iota:
            return _iota(iota[2], iota[3])[: _ints(iota[1])[-1]]
        mesh = re.search(
            r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
            self.attributes,
        )
        if not mesh:
            if self.attribute(r"\breplica_groups=(?!\{\})(.{,80})"):
                raise ValueError(
                    f"replica_groups: {self.attributes[:200]!r} cannot be read; lists, iotas and meshes can"
                )
            return []
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        strides = dict(zip(sizes, _strides(list(sizes.values())), strict=True))
        steps = []
        for axis, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[4]):
            size = int(part) if part else sizes[axis]  # 'x':(2)4 is the axis of 4 in 'x' split into 2 x 4 x rest
            rest = sizes[axis] // (size * int(before or 1))
            steps.append(range(0, size * rest * strides[axis], rest * strides[axis]))
        positions = [sum(offsets) for offsets in itertools.product(*steps)]
        if mesh[2] is None:
            return positions
        devices = _iota(mesh[2], mesh[3])
        return [devices[position] for position in positions]


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

    def trip_count(self, scope: Computation, loop: Instruction) -> int | None:
        """The number of trips of a `while` in computation `scope`; None if it depends on data.

        The condition compares an element of the loop's state with a constant or with another element, and the body adds
        a constant to it. Its initial value is read from the operand; where that is not a constant, it is taken as 0.
        """
        condition = self.computations[loop.computation("condition")]
        body = self.computations[loop.computation("body")]
        test, arguments = condition.root, None
        if test.op == "fusion":
            arguments = [self._trace(condition, name) for name in test.operands]
            condition = self.computations[test.computation("calls")]
            test = condition.root
        if test.op != "compare":
            return None
        left, right = (self._trace(condition, name, arguments) for name in test.operands)
        direction = test.attribute(r"direction=(\w+)")
        if left is not None and left.element is None:
            left, right = right, left
            direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction or "", direction)
        if left is None or left.element is None or right is None:
            return None

        def initial(element: int) -> int | None:
            state = scope[loop.operands[0]]
            value = self._trace(scope, state.operands[element]) if state.op == "tuple" else None
            return value.constant if value is not None and value.element is None else None

        limit = right.constant
        if right.element is not None:
            carried = initial(right.element)
            if carried is None:
                return None
            limit += carried
        step = self._trace(body, body.results[left.element].name) if body.root.op == "tuple" else None
        if step is None or step.element != left.element or step.constant == 0:
            return None
        distance = limit - left.constant - (initial(left.element) or 0)
        if direction in ("LE", "GE"):
            distance += 1 if direction == "LE" else -1
        return max(0, math.ceil(distance / step.constant))

    def _trace(
        self, scope: Computation, name: str, arguments: Sequence[_Linear | None] | None = None
    ) -> _Linear | None:
        """An integer as a constant, or as a constant plus an element of the computation's one parameter, a tuple. None
        if it is neither. `arguments` are the values of a fused computation's parameters."""
        i = scope[name]
        if i.op == "constant":
            return _Linear(None, int(i.arguments)) if re.fullmatch(r"-?\d+", i.arguments) else None
        if i.op == "parameter":
            return arguments[int(i.arguments)] if arguments is not None else None
        if i.op == "get-tuple-element":
            index, source = int(i.attribute(r"\bindex=(\d+)") or 0), scope[i.operands[0]]
            if source.op == "parameter" and arguments is None:
                return _Linear(index, 0)
            return self._trace_fusion(scope, source, index, arguments)
        if i.op in ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done"):
            return self._trace(scope, i.operands[0], arguments)
        if i.op == "add":
            a, b = (self._trace(scope, operand, arguments) for operand in i.operands)
            if a is None or b is None or None not in (a.element, b.element):
                return None
            return _Linear(b.element if a.element is None else a.element, a.constant + b.constant)
        return self._trace_fusion(scope, i, 0, arguments)

    def _trace_fusion(
        self, scope: Computation, i: Instruction, index: int, arguments: Sequence[_Linear | None] | None
    ) -> _Linear | None:
        """`_trace` for result `index` of a fusion."""
        if i.op != "fusion":
            return None
        fused = self.computations[i.computation("calls")]
        given = [self._trace(scope, operand, arguments) for operand in i.operands]
        return self._trace(fused, fused.results[index].name, given) if index < len(fused.results) else None


@dataclasses.dataclass(frozen=True)
class _Linear:
    """`constant`, plus element `element` of a loop's state unless that is None."""

    element: int | None
    constant: int


def read_program(text: str) -> Program:
    """Parses a module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", Computation()
    pieces: list[str] = []  # lines of the current instruction: attributes may contain line breaks

    def finish() -> None:
        line = "\n".join(pieces)
        pieces.clear()
        found = _INSTRUCTION.match(line)
        if found:
            root, name, kind, op = found.groups()
            arguments, _, attributes = line[found.end() :].partition(")")
            operands = tuple(_NAME.findall(arguments))
            current[name] = Instruction(name, op, kind, operands, arguments, attributes, bool(root))

    for line in text.splitlines():
        if line.startswith(("  %", "  ROOT %")):
            finish()
            pieces.append(line)
        elif header := _HEADER.match(line):
            finish()
            current = computations[header[2]] = Computation()
            entry = header[2] if header[1] else entry
        elif pieces:
            pieces.append(line)
    finish()
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


def _strides(sizes: Sequence[int]) -> list[int]:
    """The strides of a row-major array."""
    return [math.prod(sizes[k + 1 :]) for k in range(len(sizes))]


def _iota(sizes: str, order: str | None) -> list[int]:
    """range(n) reshaped to `sizes`, transposed to `order`, flattened."""
    shape = _ints(sizes)
    strides = _strides(shape)
    axes = _ints(order) if order else range(len(shape))
    steps = (range(0, shape[axis] * strides[axis], strides[axis]) for axis in axes)
    return [sum(offsets) for offsets in itertools.product(*steps)]
