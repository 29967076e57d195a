"""What benchmarks/tpu_decode.py reads of a decoding program, on one small enough to add up by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qwen3_jax.aot import costliest_loop, read_cost, read_program
from qwen3_jax.chips import find_chip

# A cache [4, 8, 128] (8192 bytes), three experts' weights [3, 128, 128] (32768 bytes each), logits [4, 256] (4096).
PROGRAM = """\
HloModule step, is_scheduled=true

%update.1 (param_0.1: bf16[4,8,128], param_1.1: bf16[4,1,128], param_2.1: s32[]) -> bf16[4,8,128] {
  %param_0.1 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[4,1,128]{2,1,0} parameter(1)
  %param_2.1 = s32[]{:T(128)} parameter(2)
  %constant.1 = s32[]{:T(128)} constant(0)
  ROOT %dus.1 = bf16[4,8,128]{2,1,0} dynamic-update-slice(%param_0.1, %param_1.1, %constant.1, %param_2.1, %constant.1)
}

%expert.1 (param_0.2: bf16[3,128,128], param_1.2: s32[], param_2.2: bf16[4,128]) -> bf16[4,128] {
  %param_0.2 = bf16[3,128,128]{2,1,0} parameter(0)
  %param_1.2 = s32[] parameter(1)
  %constant.2 = s32[] constant(0)
  %slice.1 = bf16[1,128,128]{2,1,0} dynamic-slice(%param_0.2, %param_1.2, %constant.2, %constant.2)
  %bitcast.1 = bf16[128,128]{1,0} bitcast(%slice.1)
  %param_2.2 = bf16[4,128]{1,0} parameter(2)
  ROOT %dot.1 = bf16[4,128]{1,0} convolution(%param_2.2, %bitcast.1), dim_labels=bf_oi->bf
}

%while_do.1 (arg.1: (s32[], bf16[4,128], bf16[3,128,128], s32[])) -> (s32[], bf16[4,128], bf16[3,128,128], s32[]) {
  %arg.1 = (s32[], bf16[4,128], bf16[3,128,128], s32[]) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%arg.1), index=0
  %x.1 = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg.1), index=1
  %w.1 = bf16[3,128,128]{2,1,0} get-tuple-element(%arg.1), index=2
  %n.1 = s32[] get-tuple-element(%arg.1), index=3
  %y.1 = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w.1, %i.1, %x.1), kind=kOutput, calls=%expert.1
  ROOT %t.1 = (s32[], bf16[4,128], bf16[3,128,128], s32[]) tuple(%i.1, %y.1, %w.1, %n.1)
}

%while_if.1 (arg.2: (s32[], bf16[4,128], bf16[3,128,128], s32[])) -> pred[] {
  %arg.2 = (s32[], bf16[4,128], bf16[3,128,128], s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%arg.2), index=0
  %n.2 = s32[] get-tuple-element(%arg.2), index=3
  ROOT %lt.1 = pred[] compare(%i.2, %n.2), direction=LT
}

%bits_do.1 (arg.3: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {
  %arg.3 = (s32[], f32[4,256]) parameter(0)
  %i.3 = s32[]{:T(128)S(6)} get-tuple-element(%arg.3), index=0
  %logits.1 = f32[4,256]{1,0} get-tuple-element(%arg.3), index=1
  %count.1 = f32[4,256]{1,0:T(4,128)S(1)} negate(%logits.1)
  %one.2 = s32[]{:T(128)S(6)} constant(1)
  %i.5 = s32[]{:T(128)S(6)} add(%i.3, %one.2)
  ROOT %t.2 = (s32[], f32[4,256]) tuple(%i.5, %logits.1)
}

%bits_if.1 (arg.4: (s32[], f32[4,256])) -> pred[] {
  %arg.4 = (s32[], f32[4,256]) parameter(0)
  %i.4 = s32[] get-tuple-element(%arg.4), index=0
  %constant.3 = s32[] constant(32)
  ROOT %lt.2 = pred[] compare(%i.4, %constant.3), direction=LT
}

%greedy.1 (arg.5: f32[4,256]) -> f32[4,256] {
  %arg.5 = f32[4,256]{1,0} parameter(0)
  ROOT %copy.9 = f32[4,256]{1,0} copy(%arg.5)
}

%sample.1 (arg.6: f32[4,256]) -> f32[4,256] {
  %arg.6 = f32[4,256]{1,0} parameter(0)
  %zero.1 = s32[] constant(0)
  %t.3 = (s32[], f32[4,256]) tuple(%zero.1, %arg.6)
  %while.1 = (s32[], f32[4,256]) while(%t.3), condition=%bits_if.1, body=%bits_do.1
  ROOT %gte.1 = f32[4,256]{1,0} get-tuple-element(%while.1), index=1
}

%body.1 (arg.7: (bf16[4,8,128], bf16[3,128,128], f32[4,256])) -> (bf16[4,8,128], bf16[3,128,128], f32[4,256]) {
  %arg.7 = (bf16[4,8,128], bf16[3,128,128], f32[4,256]) parameter(0)
  %cache.1 = bf16[4,8,128]{2,1,0} get-tuple-element(%arg.7), index=0
  %experts.1 = bf16[3,128,128]{2,1,0} get-tuple-element(%arg.7), index=1
  %logits.2 = f32[4,256]{1,0} get-tuple-element(%arg.7), index=2
  %new.1 = bf16[4,1,128]{2,1,0:T(2,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %slot.1 = s32[]{:T(128)S(6)} constant(5)
  %cache.2 = bf16[4,8,128]{2,1,0} fusion(%cache.1, %new.1, %slot.1), kind=kLoop, calls=%update.1
  %start.1 = (bf16[4,8,128]{2,1,0:S(1)}, bf16[4,8,128]{2,1,0}, u32[]{:S(2)}) copy-start(%cache.2)
  %done.1 = bf16[4,8,128]{2,1,0:S(1)} copy-done(%start.1)
  %zero.2 = s32[]{:T(128)S(6)} constant(0)
  %used.1 = s32[]{:T(128)S(6)} custom-call(), custom_call_target="AllocateBuffer"
  %x.2 = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} bitcast(%new.1)
  %t.4 = (s32[], bf16[4,128], bf16[3,128,128], s32[]) tuple(%zero.2, %x.2, %experts.1, %used.1)
  %w.2 = (s32[], /*index=1*/bf16[4,128], bf16[3,128,128], s32[]) while(%t.4), condition=%while_if.1, body=%while_do.1
  %one.1 = s32[]{:T(128)S(6)} constant(1)
  %chosen.1 = f32[4,256]{1,0} conditional(%one.1, %logits.2, %logits.2), branch_computations={%greedy.1, %sample.1}
  ROOT %t.5 = (bf16[4,8,128], bf16[3,128,128], f32[4,256]) tuple(%cache.2, %experts.1, %chosen.1)
}

%condition.1 (arg.8: (bf16[4,8,128], bf16[3,128,128], f32[4,256])) -> pred[] {
  %arg.8 = (bf16[4,8,128], bf16[3,128,128], f32[4,256]) parameter(0)
  ROOT %true.1 = pred[] constant(true)
}

ENTRY %main.1 (cache.9: bf16[4,8,128], experts.9: bf16[3,128,128], logits.9: f32[4,256]) -> bf16[4,8,128] {
  %cache.9 = bf16[4,8,128]{2,1,0} parameter(0)
  %experts.9 = bf16[3,128,128]{2,1,0} parameter(1)
  %logits.9 = f32[4,256]{1,0} parameter(2)
  %copy.1 = bf16[4,8,128]{2,0,1} copy(%cache.9)
  %t.6 = (bf16[4,8,128], bf16[3,128,128], f32[4,256]) tuple(%copy.1, %experts.9, %logits.9)
  %while.3 = (bf16[4,8,128], bf16[3,128,128], f32[4,256]) while(%t.6), condition=%condition.1, body=%body.1
  ROOT %gte.2 = bf16[4,8,128]{2,1,0} get-tuple-element(%while.3), index=0
}
"""
UPDATE, CACHE, EXPERT, LOGITS = 1024, 8192, 32768, 4096


@pytest.fixture(scope="module")
def tpu_decode() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "tpu_decode.py"
    spec = importlib.util.spec_from_file_location("tpu_decode", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tpu_decode"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_bytes_of_the_loop_body() -> None:
    """The cache's update in place writes the new slot (from VMEM); the cache is then fetched into VMEM once; 1.5
    experts are expected to be read out of three; sampling reads the logits 32 times, which beats greedy's copy."""
    program = read_program(PROGRAM)
    assert costliest_loop(program) == "body.1"
    cost = read_cost(program, find_chip("v5p"), computation="body.1", unknown_trips=1.5)
    assert cost.hbm_bytes == UPDATE + CACHE + 1.5 * EXPERT + 32 * LOGITS


def test_cache_copies(tpu_decode: ModuleType) -> None:
    """Before the loop there is one from HBM to HBM; the fetch into VMEM inside it and the update are none."""
    program = read_program(PROGRAM)
    assert tpu_decode.cache_copies(program, program.entry, (4, 8, 128)) == 1
    assert tpu_decode.cache_copies(program, "body.1", (4, 8, 128)) == 0
    copied = PROGRAM.replace("ROOT %dus.1", "%dus.1").replace(
        "%constant.1, %param_2.1, %constant.1)\n",
        "%constant.1, %param_2.1, %constant.1)\n  ROOT %copy.8 = bf16[4,8,128]{2,1,0} copy(%dus.1)\n",
    )
    assert tpu_decode.cache_copies(read_program(copied), "body.1", (4, 8, 128)) == 1
