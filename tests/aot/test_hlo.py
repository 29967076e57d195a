"""The reader of scheduled programs, on texts small enough to read by eye."""

from __future__ import annotations

import pytest

from qwen3_jax.aot.hlo import HBM, VMEM, Array, Instruction, read_program

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8, entry_computation_layout={(bf16[8,128]{1,0})->bf16[8,128]{1,0}}

FileNames
1 "step.py"

%fused (param_0: bf16[8,128], param_1: s32[]) -> (bf16[8,128], f32[8]) {
  %param_1 = s32[]{:T(128)} parameter(1)
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %twice = bf16[8,128]{1,0} add(%param_0, %param_0)
  %zero = f32[] constant(0)
  %sum = f32[8]{0} reduce(%param_0, %zero), dimensions={1}, to_apply=%plus
  ROOT %pair = (bf16[8,128]{1,0}, f32[8]{0}) tuple(%twice, %sum)
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="state"}
  %start = ((bf16[8,128]{1,0:T(8,128)(2,1)}), bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%x)
  %kernel = (f32[1024,128]{1,0:T(8,128)}, /*index=1*/f8e4m3fn[4,128]{1,0}, pred[7]{0}, s4[6]{0}) custom-call(%x, \
/*index=1*/%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="jit(step)/pallas_call" stack_frame_id=2}
  ROOT %y = bf16[8,128]{1,0} copy(%x)
}
"""


def test_program() -> None:
    program = read_program(PROGRAM)
    assert program.entry == "main"
    assert program.partitions == 8
    assert list(program.computations) == ["fused", "main"]
    assert list(program.computations["main"]) == ["x", "start", "kernel", "y"]
    fused = program.computations["fused"]
    assert [i.name for i in fused.parameters] == ["param_0", "param_1"]
    assert [i.name for i in fused.results] == ["twice", "sum"]
    assert [(i.name, k) for i, k in fused.users["param_0"]] == [("twice", 0), ("twice", 1), ("sum", 0)]
    with pytest.raises(ValueError, match=r"^text: .*; pass the text of a compiled program"):
        read_program("HloModule empty")


def test_types_have_layouts_and_memory_spaces() -> None:
    main = read_program(PROGRAM).computations["main"]
    assert main["start"].arrays == (
        Array("bf16", (8, 128), HBM),
        Array("bf16", (8, 64), VMEM),
        Array("s32", (), 2),
    )
    assert [array.bytes for array in main["kernel"].arrays] == [4 * 1024 * 128, 4 * 128, 7, 3]


def test_attributes_may_hold_line_breaks() -> None:
    kernel = read_program(PROGRAM).computations["main"]["kernel"]
    assert kernel.operands == ("x", "x")
    assert kernel.attribute(r'custom_call_target="(\w+)"') == "tpu_custom_call"
    assert kernel.op_name == "jit(step)/pallas_call"


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,4},{1,5}}", [0, 4]),
        ("{}", []),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [0, 1, 4, 5]),
        ("mesh['x'=2,'y'=4] {'y'}", [0, 1, 2, 3]),
        ("mesh['x'=2,'y'=4] {'x'}", [0, 4]),
        ("mesh['x'=2,'y'=4] {'x','y'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("mesh['x'=8] {'x':(2)2}", [0, 2]),  # the middle one of 2 x 2 x 2
        # Devices 0 4 1 5 2 6 3 7 as [2, 4]: the first row, the first column.
        ("mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'y'}", [0, 4, 1, 5]),
        ("mesh['x'=2,'y'=4], device_ids=([2,4]T(1,0)) {'x'}", [0, 2]),
    ],
)
def test_replica_groups(groups: str, first: list[int]) -> None:
    attributes = f", channel_id=1, replica_groups={groups}, dimensions={{0}}"
    assert Instruction("g", "all-gather", "f32[8]{0}", (), "", attributes, False).replica_group() == first


@pytest.mark.parametrize(
    "groups",
    ["{{0,4},{1,5},{2,6},{3,7}}", "mesh['data'=1,'fsdp'=2,'expert'=2,'context'=1,'tensor'=2] {'fsdp'}"],
    ids=["jax 0.10", "jax 0.12"],
)
def test_lines_of_both_compilers(groups: str) -> None:
    """The same all-gather, over fsdp on a mesh of fsdp 2, expert 2 and tensor 2, as each of the two writes it."""
    line = (
        "  %all_gather.11 = f32[4,16,6]{2,1,0} all-gather(%param.35), channel_id=1, "
        f"replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true, "
        'metadata={op_name="jit(loss)/jvp(MoeMlp)/shard_map/all_gather" stack_frame_id=165}'
    )
    program = read_program("HloModule loss\n\nENTRY %main () -> f32[4,16,6] {\n" + line + "\n}\n")
    gather = program.computations["main"]["all_gather.11"]
    assert (gather.op, gather.dims, gather.replica_group()) == ("all-gather", (4, 16, 6), [0, 4])


def test_unknown_spelling_of_groups() -> None:
    broken = Instruction("g", "all-gather", "f32[8]{0}", (), "", ", replica_groups=mesh<2>, dimensions={0}", False)
    with pytest.raises(ValueError, match=r"^replica_groups: .*; lists, iotas and meshes can"):
        broken.replica_group()


LOOP = """\
%fused_less (param_0: s32[], param_1: s32[]) -> pred[] {
  %param_0 = s32[] parameter(0)
  %param_1 = s32[] parameter(1)
  ROOT %less = pred[] compare(%param_0, %param_1), direction=LT
}

%fused_next (param_0: s32[]) -> (f32[], s32[]) {
  %param_0 = s32[] parameter(0)
  %two = s32[] constant(2)
  %next = s32[] add(%two, %param_0)
  %f = f32[] convert(%param_0)
  ROOT %both = (f32[], s32[]) tuple(%f, %next)
}

%body (state: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %state = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8] get-tuple-element(%state), index=1
  %n = s32[] get-tuple-element(%state), index=2
NEXT
  ROOT %new = (s32[], f32[8], s32[]) tuple(%next, %x, %n)
}

%condition (state: (s32[], f32[8], s32[])) -> pred[] {
  %state = (s32[], f32[8], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] get-tuple-element(%state), index=2
  %ten = s32[] constant(10)
TEST
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8], s32[]) {
  %x = f32[8] parameter(0)
  %first = s32[] constant(FIRST)
  %limit = s32[] constant(17)
  %limit_start = (s32[], s32[]{:S(6)}, u32[]{:S(2)}) copy-start(%limit)
  %limit_done = s32[] copy-done(%limit_start)
  %state = (s32[], f32[8], s32[]) tuple(%first, %x, %limit_done)
  ROOT %loop = (s32[], f32[8], s32[]) while(%state), condition=%condition, body=%body
}
"""
ONE = "  %one = s32[] constant(1)\n  %next = s32[] add(%i, %one)"
FUSED = (
    "  %step = (f32[], s32[]) fusion(%i), kind=kLoop, calls=%fused_next\n"
    "  %next = s32[] get-tuple-element(%step), index=1"
)
MINUS = "  %minus = s32[] constant(-3)\n  %next = s32[] add(%i, %minus)"


@pytest.mark.parametrize(
    ("next_", "test", "first", "trips"),
    [
        (ONE, "compare(%i, %ten), direction=LT", 0, 10),
        (ONE, "compare(%i, %ten), direction=LE", 0, 11),
        (ONE, "compare(%ten, %i), direction=GT", 4, 6),
        (ONE, "compare(%ten, %i), direction=GE", 4, 7),
        (ONE, "compare(%i, %ten), direction=NE", 4, 6),
        (ONE, "compare(%i, %n), direction=LT", 0, 17),  # the limit is carried, and came by an asynchronous copy
        (ONE, "fusion(%i, %ten), kind=kLoop, calls=%fused_less", 0, 10),
        (FUSED, "compare(%i, %ten), direction=LT", 1, 5),  # 1 3 5 7 9
        (FUSED, "fusion(%i, %n), kind=kLoop, calls=%fused_less", 0, 9),
        (MINUS, "compare(%i, %ten), direction=GT", 17, 3),  # 17 14 11
        (MINUS, "compare(%i, %ten), direction=GE", 16, 3),  # 16 13 10
        (ONE, "compare(%i, %ten), direction=LT", 12, 0),
        ("  %next = s32[] multiply(%i, %i)", "compare(%i, %ten), direction=LT", 0, None),
        (ONE, "or(%i, %ten)", 0, None),
    ],
)
def test_trip_counts(next_: str, test: str, first: int, trips: int | None) -> None:
    text = LOOP.replace("NEXT", next_).replace("TEST", f"  ROOT %go = pred[] {test}").replace("FIRST", str(first))
    program = read_program("HloModule loop\n\n" + text)
    main = program.computations["main"]
    assert program.trip_count(main, main["loop"]) == trips


def test_trips_that_data_decides() -> None:
    text = LOOP.replace("NEXT", ONE).replace("TEST", "  ROOT %go = pred[] compare(%i, %n), direction=LT")
    text = text.replace("%limit = s32[] constant(17)", "%limit = s32[] negate(%first)").replace("FIRST", "0")
    program = read_program("HloModule loop\n\n" + text)
    main = program.computations["main"]
    assert program.trip_count(main, main["loop"]) is None
