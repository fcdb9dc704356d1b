"""The reader of compiled programs, on a text of its own."""

import pytest
from hlo import Collective, Program, Work

TEXT = """\
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.5 (x: bf16[128,64], y: bf16[32,64]) -> (bf16[128,16], bf16[32,16]) {
  %x = bf16[128,64]{0,1:T(8,128)(2,1)} parameter(0)
  %y = bf16[32,64]{0,1:T(8,128)(2,1)} parameter(1)
  %both = (bf16[128,64]{0,1}, bf16[32,64]{0,1}) all-reduce(%x, %y), channel_id=1, to_apply=%sum
  %first = bf16[128,64]{0,1} get-tuple-element(%both), index=0
  ROOT %parts = (bf16[128,16]{0,1:T(8,128)(2,1)S(1)}, bf16[32,16]{0,1:T(8,128)(2,1)S(1)}) custom-call(%both)
}

ENTRY %main (x: bf16[128,64], y: bf16[32,64]) -> (bf16[128,16], bf16[32,16]) {
  %x.1 = bf16[128,64]{0,1} parameter(0)
  %y.1 = bf16[32,64]{0,1} parameter(1)
  ROOT %fusion = (bf16[128,16]{0,1}, bf16[32,16]{0,1}) fusion(%x.1, %y.1), kind=kCustom, calls=%all-reduce-scatter.5
}
"""


def test_each_array_of_a_combined_reduce_scatter_counts():
    """Each device keeps its slice of each array. The reader took only those of a single array."""
    assert Program(TEXT).collectives() == [
        Collective("reduce-scatter", 128 * 16, 2 * 128 * 16, in_loop=False),
        Collective("reduce-scatter", 32 * 16, 2 * 32 * 16, in_loop=False),
    ]


GPU = """\
HloModule jit_step, is_scheduled=true

%largest (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %m = f32[] maximum(%a, %b)
}

%fused_maximum (x: f32[64,640]) -> f32[64] {
  %x = f32[64,640]{1,0} parameter(0)
  %least = f32[] constant(-inf)
  ROOT %row = f32[64]{0} reduce(%x, %least), dimensions={1}, to_apply=%largest
}

%fused_gather (x.1: f32[64,640], at: s32[64,2]) -> f32[64,1,1] {
  %x.1 = f32[64,640]{1,0} parameter(0)
  %at = s32[64,2]{1,0} parameter(1)
  ROOT %chosen = f32[64,1,1]{2,1,0} gather(%x.1, %at), offset_dims={1,2}, slice_sizes={1,1}
}

%fused_gradient (x.2: f32[64,640], row.1: f32[64]) -> bf16[64,640] {
  %x.2 = f32[64,640]{1,0} parameter(0)
  %flat = f32[40960]{0} bitcast(%x.2)
  %slice = f32[640]{0} slice(%flat), slice={[0:640]}
  %row.1 = f32[64]{0} parameter(1)
  %rows = f32[64,640]{1,0} broadcast(%row.1), dimensions={0}
  %less = f32[64,640]{1,0} subtract(%x.2, %rows)
  ROOT %g = bf16[64,640]{1,0} convert(%less)
}

%fused_slice (h: bf16[256,128], i: s32[]) -> bf16[64,128] {
  %h = bf16[256,128]{1,0} parameter(0)
  %parts = bf16[64,4,128]{2,1,0} bitcast(%h)
  %i = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %part = bf16[64,1,128]{2,1,0} dynamic-slice(%parts, %zero.1, %i, %zero.1), dynamic_slice_sizes={64,1,128}
  ROOT %part.1 = bf16[64,128]{1,0} bitcast(%part)
}

%body (all: (s32[], bf16[256,128], bf16[128,640], f32[128,640])) -> (s32[]) {
  %all = (s32[], bf16[256,128]{1,0}, bf16[128,640]{1,0}, f32[128,640]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%all), index=0
  %hidden = bf16[256,128]{1,0} get-tuple-element(%all), index=1
  %kernel = bf16[128,640]{1,0} get-tuple-element(%all), index=2
  %sum = f32[128,640]{1,0} get-tuple-element(%all), index=3
  %block = bf16[64,128]{1,0} fusion(%hidden, %n), kind=kLoop, calls=%fused_slice
  %matmul = (f32[64,640]{1,0}, s8[4194304]{0}) custom-call(%block, %kernel), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %logits = f32[64,640]{1,0} get-tuple-element(%matmul), index=0
  %behind = (f32[64,640]{1,0}, s32[]) tuple(%logits, %n)
  %again = f32[64,640]{1,0} get-tuple-element(%behind), index=0
  %max = f32[64]{0} fusion(%logits), kind=kInput, calls=%fused_maximum
  %where = s32[64,2]{1,0} custom-call(), custom_call_target="labels"
  %label = f32[64,1,1]{2,1,0} fusion(%again, %where), kind=kLoop, calls=%fused_gather
  %gradient = bf16[64,640]{1,0} fusion(%again, %max), kind=kLoop, calls=%fused_gradient
  %added = (f32[128,640]{1,0}, s8[4194304]{0}) custom-call(%block, %gradient, %sum), \
custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{0}: (2, {})}, \
backend_config={"gemm_backend_config":{"beta":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}
  %sum.1 = f32[128,640]{1,0} get-tuple-element(%added), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%n, %one)
  ROOT %out = (s32[], bf16[256,128]{1,0}, bf16[128,640]{1,0}, f32[128,640]{1,0}) tuple(%next, %hidden, %kernel, %sum.1)
}

%condition (all.1: (s32[], bf16[256,128], bf16[128,640], f32[128,640])) -> pred[] {
  %all.1 = (s32[], bf16[256,128]{1,0}, bf16[128,640]{1,0}, f32[128,640]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%all.1), index=0
  %blocks = s32[] constant(4)
  ROOT %less.1 = pred[] compare(%n.1, %blocks), direction=LT
}

ENTRY %main (hidden.1: bf16[256,128], kernel.1: bf16[128,640]) -> f32[128,640] {
  %hidden.1 = bf16[256,128]{1,0} parameter(0)
  %kernel.1 = bf16[128,640]{1,0} parameter(1)
  %first = s32[] constant(0)
  %start = f32[128,640]{1,0} custom-call(), custom_call_target="zeros"
  %before = (s32[], bf16[256,128]{1,0}, bf16[128,640]{1,0}, f32[128,640]{1,0}) \
tuple(%first, %hidden.1, %kernel.1, %start)
  %loop = (s32[], bf16[256,128]{1,0}, bf16[128,640]{1,0}, f32[128,640]{1,0}) while(%before), condition=%condition, \
body=%body
  ROOT %whole = f32[128,640]{1,0} get-tuple-element(%loop), index=3
}
"""
LOGITS, KERNEL, HIDDEN, ROWS = 64 * 640, 128 * 640, 64 * 128, 64


def test_readings_of_a_block_in_a_loop():
    """By the maximum and by the gradient; neither the gather, nor what only names the array, reads all of it."""
    program = Program(GPU)
    assert program.readings("f32", LOGITS) == [2]
    assert program.readings("bf16", LOGITS) == [1]
    assert program.readings("f32", KERNEL) == [1]  # by the multiplication that adds to it
    assert program.readings("bf16", 256 * 128) == [0]  # a slice of it


def test_work_of_calls_of_cublas():
    """A workspace is not moved, an array that is added to is read and written, and a slice costs its size."""
    program = Program(GPU)
    assert [program.types[m.operands[-1]][:3] for m in program.multiplications()] == ["bf1", "f32"]
    matmuls = 2 * HIDDEN + 2 * KERNEL + 4 * LOGITS, 2 * HIDDEN + 2 * LOGITS + 2 * 4 * KERNEL
    slice_, maximum, where = 2 * 2 * HIDDEN + 4, 4 * LOGITS + 4 * ROWS, 8 * ROWS
    label, gradient = 4 * ROWS + 8 * ROWS + 4 * ROWS, 4 * LOGITS + 4 * ROWS + 2 * LOGITS
    counter = 4 + 4 + 4
    body = Work(2 * 2 * 64 * 128 * 640, sum(matmuls) + slice_ + maximum + where + label + gradient + counter)
    assert program.work("body") == body
    assert program.work().flops == 4 * body.flops
    # As long as its flops or its bytes take: the matmuls alone have flops.
    assert program.seconds(1e30, 1, "body") == body.bytes
    assert program.seconds(1, 1e30) == 4 * body.flops + program.work().bytes / 1e30


@pytest.mark.parametrize(
    "line",
    [
        "((f32[128,640]{1,0}), f32[32,640]{1,0}) reduce-scatter-start(%whole), channel_id=1, to_apply=%sum",
        "((f32[32,640]{1,0}), f32[32,640]{1,0}) all-reduce-start(%part), channel_id=1, to_apply=%sum",  # JAX 0.12
        "f32[32,640]{1,0} all-reduce-start(%part), channel_id=1, to_apply=%sum",
        "(f32[8,640]{1,0}, f32[32,640]{1,0}) all-gather-start(%part), channel_id=1, dimensions={0}",
    ],
)
def test_an_array_on_its_way_counts_once(line):
    """As its receiver gets it. The reader took the whole array of a started reduce-scatter too."""
    text = f"ENTRY %main (part: f32[32,640]) -> f32[32,640] {{\n  %send = {line}\n}}\n"
    kind = line.split("-start")[0].split()[-1]
    assert Program(text).collectives() == [Collective(kind, 32 * 640, 4 * 32 * 640, in_loop=False)]
