"""What a scheduled program costs, on programs small enough to add up by hand.

The chip of these tests has round figures: 1e12 FLOP/s, 1e9 cycles/s, 1e9 bytes/s of HBM, 1e8 bytes/s a link.
"""

from __future__ import annotations

import pytest

from qwen3_jax.aot import Cost, read_cost
from qwen3_jax.aot.cost import costliest_loop
from qwen3_jax.aot.hlo import read_program
from qwen3_jax.chips import CHIPS, Chip

CHIP = Chip("round", (), 1e12, 1e9, 1e9, 2**30, 1e8, 3, False)
BLOCK = 1024 * 1024 * 2  # bytes of bf16[1024,1024]

# Computations that the programs below share. The product of [1024, 1024] with itself is 2 * 1024 ** 3 FLOPs.
SHARED = """\
%product (param_0: bf16[1024,1024], param_1: bf16[1024,1024]) -> bf16[1024,1024] {
  %param_0 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot = bf16[1024,1024]{1,0:T(8,128)(2,1)} convolution(%param_0, %param_1), dim_labels=bf_io->bf
}

%nested_product (param_0: bf16[1024,1024], param_1: bf16[1024,1024]) -> bf16[1024,1024] {
  %param_0 = bf16[1024,1024]{1,0} parameter(0)
  %param_1 = bf16[1024,1024]{1,0} parameter(1)
  ROOT %inner = bf16[1024,1024]{1,0} fusion(%param_0, %param_1), kind=kOutput, calls=%product
}

%add_one (state: (s32[], bf16[1024,1024])) -> (s32[], bf16[1024,1024]) {
  %state = (s32[], bf16[1024,1024]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[1024,1024]{1,0} get-tuple-element(%state), index=1
  %one = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %new = (s32[], bf16[1024,1024]) tuple(%next, %x)
}
"""
FLOPS = 2 * 1024**3
X = "bf16[1024,1024]{1,0:T(8,128)(2,1)}"
FAST = "bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}"  # in VMEM
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"},"megacore_config":{"megacore_split_dim":"0"}}'
MATMUL = f"{X} fusion(%x, %x), kind=kOutput, calls=%product, {CYCLES % 5_000_000}"  # 5 ms


def cost(
    body: str, *computations: str, coords: list[list[int]] | None = None, devices: int = 4, **options: float
) -> Cost:
    """Of an entry computation of these instructions; %x is its parameter, and the result."""
    text = f"HloModule test, is_scheduled=true, num_partitions={devices}\n\n" + SHARED + "\n".join(computations)
    text += f"\nENTRY %main (x: bf16[1024,1024]) -> bf16[1024,1024] {{\n  %x = {X} parameter(0)\n"
    text += "".join(f"  {line.strip()}\n" for line in body.strip().splitlines())
    return read_cost(text + f"  ROOT %result = {X} bitcast(%x)\n}}\n", CHIP, coords, **options)


def loop(name: str, body: str, trips: int) -> str:
    """The body and the condition of a loop that runs `body` so often; %x is its state."""
    state, body = "(s32[], bf16[1024,1024])", "\n".join(f"  {line.strip()}" for line in body.splitlines())
    return f"""
%{name} (state: {state}) -> {state} {{
  %state = {state} parameter(0)
  %i = s32[]{{:T(128)S(6)}} get-tuple-element(%state), index=0
  %x = {X} get-tuple-element(%state), index=1
{body}
  %one = s32[]{{:T(128)S(6)}} constant(1)
  %next = s32[]{{:T(128)S(6)}} add(%i, %one), {CYCLES % 10**9}
  ROOT %new = {state} tuple(%next, %x)
}}

%{name}_condition (state: {state}) -> pred[] {{
  %state = {state} parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] constant({trips})
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}
"""


def run_loop(name: str) -> str:
    return f"""%zero_{name} = s32[]{{:T(128)S(6)}} constant(0)
  %state_{name} = (s32[], bf16[1024,1024]) tuple(%zero_{name}, %x)
  %while_{name} = (s32[], bf16[1024,1024]) while(%state_{name}), condition=%{name}_condition, body=%{name}"""


# ----------------------------------------------------------------------------------------------------------------------
# Time


def test_matmul_takes_the_compilers_cycles() -> None:
    """5,000,000 of them; a roofline would say 6.3 ms of HBM. The compiler counts both cores of a chip (megacore)."""
    c = cost(f"%y = {MATMUL}")
    assert (c.seconds("matmul"), c.flops("matmul"), c.hbm_bytes) == (0.005, FLOPS, 3 * BLOCK)
    assert c.timeline_s == 0.005
    assert c.step_s == c.hbm_floor_s == 3 * BLOCK / 1e9
    assert [(o.kind, o.name, o.op, o.count) for o in c.operations] == [("matmul", "y", "fusion", 1)]


def test_matmul_without_cycles_takes_its_roofline() -> None:
    for unknown in ("", f", {CYCLES % (2**63 - 1)}"):
        c = cost(f"%y = {FAST} fusion(%x, %x), kind=kOutput, calls=%nested_product{unknown}")
        assert c.flops("matmul") == FLOPS
        assert c.seconds("matmul") == 2 * BLOCK / 1e9  # of HBM; the product takes 2.1 ms


def test_loops_in_loops() -> None:
    """3 trips of a loop of 5 trips; the cycles of their counters, which are no product, are not taken."""
    inner = loop("inner", f"%y = {MATMUL}", 5)
    c = cost(run_loop("outer"), inner, loop("outer", run_loop("inner"), 3))
    assert c.seconds("matmul") == pytest.approx(15 * 0.005)
    assert c.flops("matmul") == 15 * FLOPS
    assert c.hbm_bytes == 15 * 3 * BLOCK
    assert c.timeline_s == pytest.approx(15 * 0.005, rel=1e-6)
    assert next(o.count for o in c.operations if o.kind == "matmul") == 15
    assert c.unknown_loops == ()


def test_loops_of_unknown_trips() -> None:
    endless = loop("endless", f"%y = {MATMUL}", 5).replace("compare(%i, %n), direction=LT", "custom-call(%i)")
    c = cost(run_loop("endless"), endless)
    assert (c.flops("matmul"), c.unknown_loops) == (FLOPS, ("while_endless",))
    assert cost(run_loop("endless"), endless, unknown_trips=2.5).flops("matmul") == 2.5 * FLOPS


def test_costliest_loop_alone() -> None:
    text = (
        "HloModule test\n" + SHARED + loop("small", f"%y = {FAST} copy(%x)", 100) + loop("large", f"%y = {MATMUL}", 2)
    )
    text += f"\nENTRY %main (x: bf16[1024,1024]) -> f32[] {{\n  %x = {X} parameter(0)\n  {run_loop('small')}\n"
    text += f"  {run_loop('large')}\n  ROOT %end = f32[] constant(0)\n}}\n"
    program = read_program(text)
    assert costliest_loop(program) == "large"
    assert read_cost(program, CHIP, computation="large").hbm_bytes == 3 * BLOCK


def test_conditional_takes_the_dearer_branch() -> None:
    """The copy of the first branch takes 4.2 ms, the product of the second 5 ms, though it moves nothing of HBM."""
    branches = f"""
%copies (x: bf16[1024,1024]) -> bf16[1024,1024] {{
  %x = {X} parameter(0)
  ROOT %y = {X} copy(%x)
}}

%multiplies (x: bf16[1024,1024]) -> bf16[1024,1024] {{
  %x = {FAST} parameter(0)
  ROOT %y = {FAST} fusion(%x, %x), kind=kOutput, calls=%product, {CYCLES % 5_000_000}
}}
"""
    for attributes in (
        "branch_computations={%copies, %multiplies}",
        "true_computation=%copies, false_computation=%multiplies",
    ):
        c = cost(f"%y = {X} conditional(%x, %x, %x), {attributes}", branches)
        assert (c.step_s, c.flops("matmul"), c.hbm_bytes, c.seconds("other")) == (0.005, FLOPS, 0, 0)


def test_kernels_take_a_share_of_their_roofline() -> None:
    kernel = f'%y = {FAST} custom-call(%x), custom_call_target="tpu_custom_call", backend_config='
    stated = kernel + '{"custom_call_config":{"cost_estimate":{"flops":"6000000000"}}}'
    assert cost(stated).seconds("kernel") == 0.006
    assert cost(stated).flops("kernel") == 6e9
    assert cost(stated, kernel_share=0.6).seconds("kernel") == pytest.approx(0.01)
    assert cost(kernel + "{}").seconds("kernel") == BLOCK / 1e9  # an unknown one: bytes alone
    assert cost(stated.replace("tpu_custom_call", "AllocateBuffer")).operations == ()


@pytest.mark.parametrize(
    ("name", "results", "products"),
    [
        ("splash_mha_fwd_residuals", "bf16[2,32,4096,128]{3,2,1,0}, f32[2,32,4096]{2,1,0}", 2),
        ("splash_mha_dq", "bf16[2,32,4096,128]{3,2,1,0}", 3),
        ("splash_mha_dkv", "f32[2,1024,128]{2,1,0}, bf16[2,8,4096,128]{3,2,1,0}, bf16[2,8,4096,128]{3,2,1,0}", 4),
        (
            "splash_mha_dkv_no_residuals",  # fused with dq, in parts for each block of keys
            "bf16[2,4,32,4096,128]{4,3,2,1,0}, bf16[2,8,4096,128]{3,2,1,0}, bf16[2,8,4096,128]{3,2,1,0}",
            5,
        ),
    ],
)
def test_attention_kernels(name: str, results: str, products: int) -> None:
    """Two rows of 32 heads with 8 of keys: half of 2 * 32 products of [4096, 128] with [128, 4096]."""
    c = cost(f"""
        %mask = s8[1,4,4]{{2,1,0}} constant({{...}})
        %q = bf16[2,32,4096,128]{{3,2,1,0}} constant({{...}})
        %k = bf16[2,8,4096,128]{{3,2,1,0}} constant({{...}})
        %{name}.3 = ({results}) custom-call(%mask, %q, %k, %k), custom_call_target="tpu_custom_call"
    """)
    assert c.flops("kernel") == products * 2 * 32 * 4096**2 * 128


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize(
    ("product", "flops"),
    [
        # Rows by columns: [8, 64] x [64, 16].
        ("f32[8,16] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 64 * 16),
        ("f32[8,16] convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 64 * 16),
        # A batch of 4 products [8, 64] x [64, 16], as XLA:TPU writes it: the batch is a spatial axis with a window of 4
        # and a dilation, of whose 4 * 4 places only 4 are not padding.
        (
            "f32[8,16,4] convolution(%c, %d), window={size=4 stride=3 lhs_dilate=4}, dim_labels=bf0_io0->bf0",
            4 * 2 * 8 * 64 * 16,
        ),
        # A window of 3 over 4 places, padded by one on both sides: 3 * 4 pairs less the two on padding.
        (
            "f32[8,16,4] convolution(%c, %e), window={size=3 pad=1_1}, dim_labels=bf0_io0->bf0",
            (3 * 4 - 2) * 2 * 8 * 64 * 16,
        ),
        # A window of 2 in steps of 2 over 4 places, padded by one on both sides: 3 * 2 pairs less the two on padding.
        (
            "f32[8,16,3] convolution(%c, %h), window={size=2 stride=2 pad=1_1}, dim_labels=bf0_io0->bf0",
            (3 * 2 - 2) * 2 * 8 * 64 * 16,
        ),
        # Two spatial axes; the second one's window of 2, dilated to 3, over 5 places and one of padding at either end:
        # 5 * 2 pairs less the two on padding.
        (
            "f32[8,16,4,5] convolution(%f, %g), window={size=1x2 pad=0_0x1_1 rhs_dilate=1x2}, "
            "dim_labels=bf01_io01->bf01",
            4 * (5 * 2 - 2) * 2 * 8 * 64 * 16,
        ),
    ],
)
def test_flops_of_products(product: str, flops: int) -> None:
    c = cost(f"""
        %a = f32[8,64] constant({{...}})
        %b = f32[64,16] constant({{...}})
        %c = f32[8,64,4] constant({{...}})
        %d = f32[64,16,4] constant({{...}})
        %e = f32[64,16,3] constant({{...}})
        %f = f32[8,64,4,5] constant({{...}})
        %g = f32[64,16,1,2] constant({{...}})
        %h = f32[64,16,2] constant({{...}})
        %y = {product}
    """)
    assert c.flops("matmul") == flops


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


def test_bytes_are_of_hbm_and_vmem_is_faster() -> None:
    c = cost(f"%y = {FAST} copy(%x)\n%z = {FAST} add(%y, %y)\n%host = {X.replace(')}', ')S(5)}')} copy(%z)")
    assert c.hbm_bytes == BLOCK
    assert c.seconds("other") == pytest.approx((BLOCK + 3 * BLOCK / 20 + BLOCK / 20) / 1e9)


def test_asynchronous_copies_count_in_the_floor_alone() -> None:
    """To VMEM one end is HBM, within HBM both; of a slice no more than the slice."""
    c = cost(f"""
        %start = ({FAST}, {X}, u32[]{{:S(2)}}) copy-start(%x)
        %y = {FAST} copy-done(%start)
        %start2 = ({X}, {X}, u32[]{{:S(2)}}) copy-start(%x)
        %y2 = {X} copy-done(%start2)
        %start3 = (({X}), bf16[8,1024]{{1,0:S(1)}}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:8], [0:1024]}}
        %y3 = bf16[8,1024]{{1,0:S(1)}} slice-done(%start3)
    """)
    assert c.hbm_bytes == 3 * BLOCK + BLOCK / 128
    assert c.timeline_s == 0
    assert c.step_s == c.hbm_floor_s == c.hbm_bytes / 1e9


UPDATES = """
%retile (table: f32[1000,256]) -> f32[1000,256] {
  %table = f32[1000,256]{1,0:T(16,128)} parameter(0)
  ROOT %copy = f32[1000,256]{1,0:T(8,128)} copy(%table)
}

%fused (table: f32[1000,256], new: f32[4,256], at: s32[4]) -> f32[1000,256] {
  %table = f32[1000,256] parameter(0)
  %new = f32[4,256] parameter(1)
  %at = s32[4] parameter(2)
  %zero = s32[] constant(0)
  BODY
}
"""
TABLE, ROWS = 1000 * 256 * 4, 4 * 256 * 4


@pytest.mark.parametrize(
    ("body", "moved"),
    [
        # Updates in place write what they update; the table is not read.
        ("ROOT %r = f32[1000,256] dynamic-update-slice(%table, %new, %zero, %zero)", 2 * ROWS),
        ("ROOT %r = f32[1000,256] scatter(%table, %at, %new), to_apply=%plus", 2 * ROWS),
        (
            "%s = f32[1000,256] scatter(%table, %at, %new), to_apply=%plus\n  ROOT %r = f32[1000,256] bitcast(%s)",
            2 * ROWS,
        ),
        # A fusion that changes nothing but the tiles, in place, is between.
        (
            "%t = f32[1000,256] fusion(%table), output_to_operand_aliasing={{}: (0, {})}, calls=%retile\n"
            "  ROOT %r = f32[1000,256] dynamic-update-slice(%t, %new, %zero, %zero)",
            2 * ROWS,
        ),
        # In place of zeros made on the spot: all of it is written.
        (
            "%z = f32[1000,256] broadcast(%zero)\n  ROOT %r = f32[1000,256] scatter(%z, %at, %new), to_apply=%plus",
            TABLE + ROWS,
        ),
        # What is read of a slice is the slice, and the bitcast of a parameter is the parameter.
        (
            "%b = f32[1000,256] bitcast(%table)\n  %s = f32[4,256] dynamic-slice(%b, %zero, %zero)\n"
            "  %t = f32[4,256] add(%s, %new)\n  ROOT %r = f32[1000,256] broadcast(%t)",
            TABLE + 2 * ROWS,
        ),
        ("%s = f32[4,256] gather(%table, %at)\n  ROOT %r = f32[1000,256] broadcast(%s)", TABLE + ROWS),
        # No more than the whole, however often its rows are gathered.
        ("%s = f32[9000,256] gather(%table, %at)\n  ROOT %r = f32[1000,256] slice(%s)", 2 * TABLE),
        # Sliced and read whole: whole.
        (
            "%s = f32[4,256] slice(%table), slice={[0:4], [0:256]}\n  ROOT %r = f32[1000,256] add(%table, %s)",
            2 * TABLE,
        ),
        ("ROOT %r = f32[1000,256] bitcast(%table)", 2 * TABLE),
    ],
)
def test_bytes_of_fusions(body: str, moved: int) -> None:
    """%new is read by those that name it; %at always lies in VMEM."""
    c = cost(
        """
        %table = f32[1000,256] constant({...})
        %new = f32[4,256] constant({...})
        %at = s32[4]{0:S(1)} constant({...})
        %y = f32[1000,256] fusion(%table, %new, %at), kind=kLoop, calls=%fused
        """,
        UPDATES.replace("BODY", body),
    )
    assert c.hbm_bytes == moved
    assert c.seconds("other") == moved / 1e9


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        ("f32[1000,256] dynamic-update-slice(%table, %new, %at, %at)", 2 * ROWS),
        ("f32[1000,256] scatter(%table, %at, %new), to_apply=%plus", 2 * ROWS),
        ("f32[4,256] gather(%table, %at)", 2 * ROWS),
        ("f32[4,256] dynamic-slice(%table, %at, %at)", 2 * ROWS),
        ("(f32[1000,256], s32[]{:S(6)}) sort(%table, %at), to_apply=%less", 2 * TABLE),
    ],
)
def test_bytes_of_single_instructions(instruction: str, moved: int) -> None:
    c = cost(f"""
        %table = f32[1000,256] constant({{...}})
        %new = f32[4,256] constant({{...}})
        %at = s32[4]{{0:S(1)}} constant({{...}})
        %y = {instruction}
    """)
    assert c.hbm_bytes == moved


def test_fusion_of_several_results() -> None:
    """Two update parameters in place, one of them in a fusion of its own; the third is written whole."""
    c = cost(
        """
        %table = f32[1000,256] constant({...})
        %table2 = f32[1000,256] constant({...})
        %new = f32[4,256] constant({...})
        %at = s32[4]{0:S(1)} constant({...})
        %y = (f32[1000,256], f32[1000,256], f32[500,256]) fusion(%new, %table, %at, %table2), calls=%outer
        """,
        UPDATES.replace("BODY", "ROOT %r = f32[1000,256] scatter(%table, %at, %new), to_apply=%plus"),
        """
%outer (new: f32[4,256], table: f32[1000,256], at: s32[4], table2: f32[1000,256]) -> (f32[1000,256], f32[500,256]) {
  %new = f32[4,256] parameter(0)
  %table = f32[1000,256] parameter(1)
  %at = s32[4] parameter(2)
  %table2 = f32[1000,256] parameter(3)
  %zero = s32[] constant(0)
  %updated = f32[1000,256] fusion(%table, %new, %at), kind=kLoop, calls=%fused
  %updated2 = f32[1000,256] dynamic-update-slice(%table2, %new, %zero, %zero)
  %wide = f32[500,256] broadcast(%new)
  ROOT %all = (f32[1000,256], f32[1000,256], f32[500,256]) tuple(%updated, %updated2, %wide)
}
""",
    )
    assert c.hbm_bytes == ROWS + 2 * ROWS + TABLE / 2


# ----------------------------------------------------------------------------------------------------------------------
# Collectives. A group of 4 on one ring: 2 links, so 3/4 of BLOCK's bytes take 3/4 * BLOCK / 2e8 s to gather.

GATHER_S = 0.75 * BLOCK / 2e8  # 7.9 ms
SMALL = "bf16[256,1024]{1,0:T(8,128)(2,1)}"
PART = f"%part = {SMALL} constant({{...}})\n"
GROUPS = "channel_id=7, replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
    ("instruction", "kind", "size", "seconds"),
    [
        (f"{X} all-gather(%part), {GROUPS}", "all-gather", BLOCK, GATHER_S),
        (f"{SMALL} reduce-scatter(%x), {GROUPS}", "reduce-scatter", BLOCK, GATHER_S),
        (f"{X} all-reduce(%x), {GROUPS}", "all-reduce", BLOCK, 2 * GATHER_S),
        (f"({X}, {SMALL}) all-reduce(%x, %part), {GROUPS}", "all-reduce", BLOCK * 1.25, 2.5 * GATHER_S),
        # Half of 4 * BLOCK crosses the middle of the ring: half of that either way, over two links each.
        (f"{X} all-to-all(%x), {GROUPS}", "all-to-all", BLOCK, 4 * BLOCK / 8e8),
        (f"{X} all-reduce(%x), channel_id=7, replica_groups={{}}", "all-reduce", BLOCK, 2 * GATHER_S),
    ],
)
def test_synchronous_collectives(instruction: str, kind: str, size: float, seconds: float) -> None:
    c = cost(f"{PART} %y = {instruction}\n%z = {MATMUL}")
    (only,) = c.collectives
    assert (only.kind, only.group_size, only.synchronous, only.count, only.bytes) == (kind, 4, True, 1, size)
    assert only.seconds == only.exposed_s == c.seconds("collective") == c.exposed_s == pytest.approx(seconds)
    assert c.timeline_s == pytest.approx(seconds + 0.005)
    assert c.hbm_bytes == 3 * BLOCK


def test_asynchronous_collective_hides_under_computation() -> None:
    def gathered(products: int) -> Cost:
        return cost(
            f"{PART} %start = ({SMALL}, {X}) all-gather-start(%part), {GROUPS}\n"
            + "".join(f"%y{k} = {MATMUL}\n" for k in range(products))
            + f"%z = {X} all-gather-done(%start)\n%last = {MATMUL}"
        )

    for products, exposed in ((0, GATHER_S), (1, GATHER_S - 0.005), (2, 0)):
        c = gathered(products)
        (only,) = c.collectives
        assert (only.kind, only.synchronous, only.bytes) == ("all-gather", False, BLOCK)
        assert only.seconds == pytest.approx(GATHER_S)
        assert only.exposed_s == c.exposed_s == pytest.approx(exposed)
        assert c.timeline_s == pytest.approx(0.005 * (products + 1) + exposed)


def test_collectives_share_the_links() -> None:
    """Two permutations fly in opposite directions at a time, BLOCK / 1e8 s each; a third waits."""

    def permuted(n: int) -> Cost:
        starts = [f"%s{k} = ({X}, {X}, u32[]) collective-permute-start(%x), channel_id={k}" for k in range(n)]
        ends = [f"%e{k} = {X} collective-permute-done(%s{k})" for k in range(n)]
        return cost("\n".join(starts + ends))

    for n, rounds in ((1, 1), (2, 1), (3, 2), (4, 2)):
        assert permuted(n).timeline_s == pytest.approx(rounds * BLOCK / 1e8)
        assert permuted(n).seconds("collective") == pytest.approx(n * BLOCK / 1e8)
    # A gather takes both directions: it waits for the permutation. That nothing ends them here loses no time.
    c = cost(f"""{PART} %s = ({X}, {X}, u32[]) collective-permute-start(%x), channel_id=1
        %g = ({SMALL}, {X}) all-gather-start(%part), {GROUPS}""")
    assert c.timeline_s == pytest.approx(BLOCK / 1e8 + GATHER_S)
    assert c.exposed_s == c.timeline_s


FUSED_GATHER = f"""
%NAME (param_0: bf16[256,1024], param_1: bf16[1024,1024]) -> bf16[1024,1024] {{
  %param_0 = {SMALL} parameter(0)
  %param_1 = {X} parameter(1)
  %gathered = {X} all-gather(%param_0), {GROUPS}
  LAST
}}
"""
START = f'ROOT %s = {X} custom-call(%gathered), custom_call_target="AsyncCollectiveStart"'
CARRY = f"ROOT %dot = {X} convolution(%param_1, %param_1), dim_labels=bf_io->bf"
DONE = f'ROOT %d = {X} custom-call(%gathered), custom_call_target="AsyncCollectiveDone"'


def gather_fusion(name: str, last: str) -> str:
    return FUSED_GATHER.replace("NAME", name).replace("LAST", last)


def test_collective_that_fusions_carry() -> None:
    """Started by one fusion, carried along by another that multiplies, landed by a third: it is one collective."""
    carrying = f"{X} fusion(%part, %x), calls=%carry, {CYCLES % 5_000_000}"
    c = cost(
        f"""{PART} %start = {X} fusion(%part, %x), calls=%start_it
        %y = {carrying}
        %done = {X} fusion(%part, %x), calls=%end_it""",
        gather_fusion("start_it", START),
        gather_fusion("carry", CARRY),
        gather_fusion("end_it", DONE),
    )
    (only,) = c.collectives
    assert (only.count, only.synchronous, only.bytes) == (1, False, BLOCK)
    assert c.exposed_s == pytest.approx(GATHER_S - 0.005)
    assert c.timeline_s == pytest.approx(GATHER_S)
    assert c.flops("matmul") == FLOPS


def test_what_a_fusion_carries_is_not_moved() -> None:
    """Part, buffer and gathered array of a collective in flight go through the fusion where they lie: its product reads
    one array and writes one."""
    results = f"({X}, {SMALL}, {X}, {X})"
    c = cost(
        f"""{PART} %whole = {X} constant({{...}})
        %y = {results} fusion(%part, %x, %whole), calls=%go_on""",
        f"""
%go_on (param_0: bf16[256,1024], param_1: bf16[1024,1024], param_2: bf16[1024,1024]) -> {results} {{
  %param_0 = {SMALL} parameter(0)
  %param_1 = {X} parameter(1)
  %param_2 = {X} parameter(2)
  %gathered = {X} all-gather(%param_0), {GROUPS}
  %dot = {X} convolution(%param_1, %param_1), dim_labels=bf_io->bf
  ROOT %all = {results} tuple(%dot, %param_0, %param_2, %gathered)
}}
""",
    )
    assert c.hbm_bytes == 2 * BLOCK


def test_collective_fused_with_a_product_alone() -> None:
    """No other fusion starts or lands it: it hides under this one."""
    for cycles, exposed in ((5_000_000, GATHER_S - 0.005), (9_000_000, 0)):
        fused = f"{X} fusion(%part, %x), calls=%carry, {CYCLES % cycles}"
        c = cost(f"{PART} %y = {fused}", gather_fusion("carry", CARRY))
        assert c.collectives[0].count == 1
        assert c.exposed_s == pytest.approx(exposed)
        assert c.timeline_s == pytest.approx(max(GATHER_S, cycles / 1e9))


def test_all_reduce_fused_with_its_slice_is_a_reduce_scatter() -> None:
    """What the compiler writes for one; half the time of the all-reduce that it holds, and nothing runs beside it."""
    held = f"""
%all-reduce-scatter (input: bf16[1024,1024]) -> bf16[256,1024] {{
  %input = {X} parameter(0)
  %sum = {X} all-reduce(%input), {GROUPS}
  %id = u32[] partition-id()
  ROOT %mine = {SMALL} dynamic-slice(%sum, %id, %id)
}}
"""
    emitter = 'backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}'
    c = cost(f"%y = {SMALL} fusion(%x), kind=kCustom, calls=%all-reduce-scatter, {emitter}\n%z = {MATMUL}", held)
    (only,) = c.collectives
    assert (only.kind, only.group_size, only.synchronous, only.bytes) == ("reduce-scatter", 4, True, BLOCK)
    assert only.exposed_s == only.seconds == pytest.approx(GATHER_S)
    assert c.timeline_s == pytest.approx(GATHER_S + 0.005)
    assert c.seconds("other") == 0


def test_collectives_of_loops_add_up_by_kind() -> None:
    gathers = loop("layers", f"{PART} %y = {X} all-gather(%part), {GROUPS}", 6)
    pair = f"{PART} %y = {X} all-gather(%part), channel_id=1, replica_groups={{{{0,1}}}}"
    c = cost(f"{run_loop('layers')}\n{pair}", gathers)
    assert [(s.kind, s.group_size, s.count, s.bytes) for s in c.collectives] == [
        ("all-gather", 4, 6, 6 * BLOCK),
        ("all-gather", 2, 1, BLOCK),
    ]
    assert c.collectives[0].seconds == pytest.approx(6 * GATHER_S)


@pytest.mark.parametrize(
    ("shape", "group", "bandwidth"),
    [
        ((4, 4, 4), range(4), 2e8),  # a ring
        ((4, 4, 4), range(16), 4e8),  # two rings
        ((4, 4, 4), range(64), 6e8),
        ((4, 4, 4), range(2), 1e8),  # a part of a ring does not close
        ((4, 4, 2), range(4), 1e8),  # no ring without whole cubes
        ((4, 4, 2), range(32), 3e8),
    ],
)
def test_torus_axes(shape: tuple[int, int, int], group: range, bandwidth: float) -> None:
    nx, ny, nz = shape
    coords = [[x, y, z, 0] for z in range(nz) for y in range(ny) for x in range(nx)]
    ids = ",".join(map(str, group))
    c = cost(f"%y = {X} all-reduce(%x), replica_groups={{{{{ids}}}}}", coords=coords)
    n = len(group)
    assert c.seconds("collective") == pytest.approx(2 * (n - 1) / n * BLOCK / bandwidth)
    assert c.collectives[0].group_size == n


def test_sparse_core_works_beside_the_chip() -> None:
    """4.2 ms of a copy under a product of 5 ms; its bytes count."""
    called = (
        f"%called (x: bf16[1024,1024]) -> bf16[1024,1024] {{\n  %x = {X} parameter(0)\n  ROOT %y = {X} copy(%x)\n}}\n"
    )
    start = f'%s = (({X}), {X}) call-start(%x), async_execution_thread="sparsecore", to_apply=%called'
    c = cost(f"{start}\n%y = {MATMUL}\n%d = {X} call-done(%s)", called)
    assert (c.timeline_s, c.hbm_bytes, c.seconds("other")) == (0.005, 5 * BLOCK, 0)
    assert cost(f"{start}\n%d = {X} call-done(%s)", called).timeline_s == 2 * BLOCK / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# The compiler itself


def test_scanned_products_compiled_for_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan of 7 trips, two products each, on one v5e chip."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def layers(x_BD: jax.Array, up_LDF: jax.Array, down_LFD: jax.Array) -> jax.Array:
        def layer(x_BD: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return jax.nn.relu(x_BD @ weights[0]) @ weights[1], None

        return jax.lax.scan(layer, x_BD, (up_LDF, down_LFD))[0]

    shapes = (512, 1024), (7, 1024, 4096), (7, 4096, 1024)
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    text = jax.jit(layers).lower(*given).compile().as_text()
    assert text is not None
    c = read_cost(text, CHIPS["v5e"])
    weights = 7 * 2 * 1024 * 4096 * 2
    assert c.flops("matmul") == 7 * 2 * (2 * 512 * 1024 * 4096)
    assert weights <= c.hbm_bytes < 1.5 * weights  # and activations, where they do not stay in VMEM
    assert c.flops("matmul") / CHIPS["v5e"].peak_flops < c.step_s < 2 * c.flops("matmul") / CHIPS["v5e"].peak_flops
    assert c.unknown_loops == ()
