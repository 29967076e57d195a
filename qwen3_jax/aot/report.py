"""Compiles a program and reports on one page whether it fits, what it does, and its estimated time."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import jax

from qwen3_jax.aot.cost import Operation, costliest_loop, read_cost
from qwen3_jax.aot.hlo import read_program
from qwen3_jax.aot.programs import Work
from qwen3_jax.chips import Chip, find_chip

_TEMPORARIES = "activations and temporaries"
_KERNEL_SHARE = 0.6  # share of its roofline that a Pallas kernel may reach, for the second estimate
_COSTLIEST = 6
_SCAFFOLD = re.compile(
    r"closed_call|checkpoint|rematted_computation|while|body|cond|branch_\d+_fun|shard_map|layers?_[\d_]+|dot_general"
)
_ADVICE = {
    "parameters": "use more chips along mesh.fsdp (or mesh.tensor)",
    "optimizer": "use more chips along mesh.fsdp (or mesh.data)",
    "cache": "use fewer rows, a shorter context, or more chips",
    _TEMPORARIES: "use fewer tokens per micro-batch (accumulation), mesh.context, remat, or a shorter compute.keep",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of compiling a program; plain numbers, ready for JSON.

    what: a description of the program. mesh: the axes larger than 1. chip: its name.
    hbm: bytes per chip by content. capacity: HBM bytes of a chip.
    tokens: tokens that one run on all chips reads or writes. compile_s: seconds of compiling. compiler: its version.
    flops: FLOPs that one run needs per chip. peak_flops: FLOP/s of a chip.
    floor_s: seconds that all chips together take to read once what must be read; None for training.

    The other fields are None or empty if the compiler refused the program because of its memory:
    step_s: estimated seconds. slow_step_s: the same with kernels at 60 % of their roofline.
    seconds: by kind; for collectives, the exposed ones. work: executed FLOPs by kind, and HBM bytes, per chip.
    collectives, costliest: rows of the two tables.
    """

    what: str
    topology: str
    mesh: dict[str, int]
    chips: int
    chip: str
    hbm: dict[str, float]
    capacity: float
    tokens: int
    compile_s: float
    compiler: str
    flops: float
    peak_flops: float
    step_s: float | None = None
    slow_step_s: float | None = None
    floor_s: float | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    work: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: tuple[dict[str, Any], ...] = ()
    costliest: tuple[dict[str, Any], ...] = ()

    @property
    def hbm_bytes(self) -> float:
        return sum(self.hbm.values())

    @property
    def fits(self) -> bool:
        return self.step_s is not None and self.hbm_bytes <= self.capacity

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: needed FLOPs over peak FLOPs in the estimated time."""
        return self.step_s and self.flops / (self.step_s * self.peak_flops)

    @property
    def tokens_per_second(self) -> float | None:
        return self.step_s and self.tokens / self.step_s

    def dollars_per_billion_tokens(self, price: float) -> float | None:
        """`price`: dollars per chip and hour."""
        return self.tokens_per_second and self.chips * price / 3600 * 1e9 / self.tokens_per_second

    def to_json(self, price: float | None = None) -> dict[str, Any]:
        """All fields and derived figures."""
        derived = {name: getattr(self, name) for name in ("fits", "hbm_bytes", "mfu", "tokens_per_second")}
        if price is not None:
            derived["dollars_per_billion_tokens"] = self.dollars_per_billion_tokens(price)
        return dataclasses.asdict(self) | derived


def compile_report(work: Work, topology: str) -> tuple[Report, str]:
    """Compiles a program and reads its schedule.

    Returns:
      The report, and the scheduled HLO; that is empty if the compiler refused the program.
    """
    chip, mesh, held = find_chip(topology), work.mesh, work.held
    start = time.perf_counter()
    lowered = work.lower()
    compiled = None
    try:
        compiled = lowered.compile()
        stats = compiled.memory_analysis()
        assert stats is not None
        total = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        total = refused_bytes(str(error), sum(held.values()) - work.elsewhere)
    report = Report(
        what=work.what,
        topology=topology,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        chips=mesh.size,
        chip=chip.name,
        hbm=held | {_TEMPORARIES: max(total + work.elsewhere - sum(held.values()), 0.0)},
        capacity=chip.hbm_bytes,
        tokens=work.tokens,
        compile_s=time.perf_counter() - start,
        compiler=f"jax {jax.__version__}, libtpu {version('libtpu')}",
        flops=work.flops / mesh.size,
        peak_flops=chip.peak_flops,
        floor_s=work.bytes / mesh.size / chip.hbm_bandwidth if work.bytes else None,
    )
    text = compiled and compiled.as_text()
    if not text:
        return report, ""
    return dataclasses.replace(report, **_read(text, work, chip)), text


def _read(text: str, work: Work, chip: Chip) -> dict[str, Any]:
    """The fields of a report that come from the schedule."""
    program, devices = read_program(text), work.mesh.devices.flat
    options: dict[str, Any] = {
        "coords": [device.coords for device in devices],
        "computation": costliest_loop(program) if work.is_loop else None,
        "unknown_trips": work.unknown_trips,
    }
    cost = read_cost(program, chip, **options)
    return {
        "step_s": cost.step_s,
        "slow_step_s": read_cost(program, chip, **options, kernel_share=_KERNEL_SHARE).step_s,
        "seconds": {
            "matrix products": cost.seconds("matmul"),
            "kernels": cost.seconds("kernel"),
            "other": cost.seconds("other"),
            "collectives": cost.exposed_s,
        },
        "work": {"matrix products": cost.flops("matmul"), "kernels": cost.flops("kernel"), "hbm": cost.hbm_bytes},
        "collectives": tuple(dataclasses.asdict(c) for c in cost.collectives),
        "costliest": _costliest(cost.operations),
    }


def _costliest(operations: Iterable[Operation]) -> tuple[dict[str, Any], ...]:
    """The operations that take longest. Equal operations of unrolled layers and of rematerialisation are summed."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for o in operations:
        kind, seconds = (o.op, o.exposed_s) if o.kind == "collective" else (o.kind, o.seconds)
        array = re.search(r"\w+\[[\d,]*\]", o.shape)  # without its layout; of a tuple, the first element
        names = {"kind": kind, "shape": array[0] if array else o.shape, "source": _source(o.op_name)}
        row = rows.setdefault(tuple(names.values()), {"seconds": 0.0, "count": 0.0} | names)
        row["seconds"] += seconds
        row["count"] += o.count
    return tuple(sorted(rows.values(), key=lambda row: -row["seconds"])[:_COSTLIEST])


def _source(op_name: str) -> str:
    """The last parts of an operation's place in the Python program, without those that loops and transforms add."""
    parts = re.split(r"/(?![^(]*\))", op_name)
    return "/".join([part for part in parts if not _SCAFFOLD.fullmatch(part)][-3:])


def refused_bytes(message: str, held: float) -> float:
    """HBM bytes per chip according to the compiler's refusal; infinite if it does not say."""
    used = re.search(r"Used ([\d.]+)([KMGT])i?B? of", message)
    size = used or re.search(r"HLO temporaries \(([\d.]+)([KMGT])", message)
    if size is None:
        return math.inf
    return float(size[1]) * 2 ** (10 * " KMGT".index(size[2])) + (0 if used else held)


# ----------------------------------------------------------------------------------------------------------------------
# The page


def page(report: Report, price: float | None = None) -> str:
    """The report as text. price: dollars per chip and hour."""
    axes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items()) or "one chip"
    lines = [
        report.what,
        f"on {report.topology}: {report.chips} chips, {axes}",
        f"compiled in {report.compile_s:.0f} s by XLA:TPU ({report.compiler}); nothing was run",
        "",
        *_memory(report),
    ]
    if report.step_s is not None:
        lines += ["", *_estimate(report, price), "", *_tables(report), "", _CAVEATS]
    return "\n".join(lines)


_WIDTH = 80

_CAVEATS = """\
Matrix products take the compiler's estimated cycles, kernels their roofline,
collectives their bytes over the links of their torus axes, everything else its
bytes at HBM's bandwidth. A collective is exposed while nothing runs beside it,
waiting for the links included. A step takes at least the time of its HBM bytes.
Loops count as often as they run. Not counted: launches, transfers to hosts and
between slices, gathers and sorts slower than HBM, imbalance. The estimate tends
to be too low (a published step took 1.6 times its estimate): compare it only
with other estimates."""


def _memory(report: Report) -> list[str]:
    lines = [f"{'HBM per chip':32}{'GiB':>8}"]
    lines += [f"  {name:30}{size / 2**30:8.2f}" for name, size in report.hbm.items()]
    free = (report.capacity - report.hbm_bytes) / 2**30
    verdict = f"fits, {free:.2f} free" if report.fits else f"DOES NOT FIT, {-free:.2f} over"
    lines.append(f"  {'total':30}{report.hbm_bytes / 2**30:8.2f} of {report.capacity / 2**30:.0f}: {verdict}")
    if not report.fits:
        largest = max(report.hbm, key=lambda name: report.hbm[name])
        lines.append(f"  the largest part is {largest}: {_ADVICE[largest]}")
    return lines


def _estimate(report: Report, price: float | None) -> list[str]:
    assert report.step_s is not None
    assert report.slow_step_s is not None
    slow = f"{_time(report.slow_step_s)} with kernels at {_KERNEL_SHARE:.0%}"
    lines = [_line("estimated step", _time(report.step_s), slow if report.seconds["kernels"] else "")]
    if report.floor_s:
        ratio = f"x {report.step_s / report.floor_s:.2f}"
        lines.append(_line("  floor of memory bandwidth", _time(report.floor_s), ratio))
    else:
        lines.append(_line("  MFU", f"{report.mfu:.1%}"))
    rate = report.tokens_per_second or 0
    lines.append(_line("  tokens/s", f"{rate:,.0f}", f"{rate / report.chips:,.1f} per chip"))
    if price is not None:
        cost = report.dollars_per_billion_tokens(price)
        lines.append(_line("  $ per 10^9 tokens", f"{cost:,.2f}", f"at ${price:g} per chip and hour"))
    return lines


def _tables(report: Report) -> list[str]:
    notes = {
        "matrix products": f"{report.work['matrix products']:.3g} FLOPs",
        "kernels": f"{report.work['kernels']:.3g} FLOPs",
        "other": "at HBM's bandwidth",
        "collectives": "not hidden",
        "waiting for HBM": f"{report.work['hbm'] / 1e9:,.1f} GB, async copies included",
    }
    waiting = max((report.step_s or 0.0) - sum(report.seconds.values()), 0.0)
    seconds = report.seconds | {"waiting for HBM": waiting}
    lines = [
        _line("per chip and step", "time"),
        *(_line(f"  {kind}", _time(seconds[kind]), notes[kind]) for kind in notes),
    ]
    if report.collectives:
        lines += ["", "collectives             devices   count        GB        time     exposed"]
    for c in report.collectives:
        name = f"{c['kind']}{'' if c['synchronous'] else ', async'}"
        numbers = f"{c['count']:8,.0f}{c['bytes'] / 1e9:10,.2f}{_time(c['seconds']):>12}{_time(c['exposed_s']):>12}"
        lines.append(f"  {name:24}{c['group_size']:5}{numbers}")
    lines += ["", "costliest                count        time"]
    for o in report.costliest:
        line = f"  {o['kind']:20}{o['count']:8,.0f}{_time(o['seconds']):>12}   {o['shape']}"
        fits = len(line) + 2 + len(o["source"]) <= _WIDTH
        lines += [f"{line}  {o['source']}"] if fits else [line, f"{'':45}{o['source']}"]
    return lines


def _line(name: str, value: str, note: str = "") -> str:
    return f"{name:32}{value:>10}   {note}".rstrip()


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
