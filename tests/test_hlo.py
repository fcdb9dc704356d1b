"""The reader of compiled programs, on a text of its own."""

from hlo import Collective, Program

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
