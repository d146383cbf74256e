"""The reading of TTGIR that finds copies into what a product of Hopper still reads."""

from __future__ import annotations

import pytest

from bench.hardware.triton_buffers import overwritten

# What Triton makes of a loop over x and w, prefetched two steps ahead, by the buffers of x and the products that a wait
# leaves running. The loop before it shares nothing with it.
TTGIR = """
    scf.for %i = %a to %b step %c : i32 {{
    }} loc(#l)
    %x = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable> loc(#l)
    %w = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared1, #smem, mutable> loc(#l)
    %x_0 = ttg.memdesc_index %x[%c0] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#l)
    %t0 = ttg.async_copy_global_to_local %p, %x_0 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#l)
    %w_0 = ttg.memdesc_index %w[%c0] : !ttg.memdesc<3x64x128xbf16> -> !ttg.memdesc<64x128xbf16> loc(#l)
    %t1 = ttg.async_copy_global_to_local %p, %w_0 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#l)
    %x_1 = ttg.memdesc_index %x[%c1] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#l)
    %t2 = ttg.async_copy_global_to_local %p, %x_1 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#l)
    %w_1 = ttg.memdesc_index %w[%c1] : !ttg.memdesc<3x64x128xbf16> -> !ttg.memdesc<64x128xbf16> loc(#l)
    %t3 = ttg.async_copy_global_to_local %p, %w_1 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#l)
    %s:3 = scf.for %k = %begin to %end step %c64 iter_args(%acc = %zero) -> (tensor<64x128xf32>) : i32 {{
      %x_2 = ttg.memdesc_index %x[%r] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#l)
      %x_r = ttg.local_load %x_2 token %t : !ttg.memdesc<64x64xbf16> -> tensor<64x64xbf16, #blocked> loc(#l)
      %w_2 = ttg.memdesc_index %w[%r] : !ttg.memdesc<3x64x128xbf16> -> !ttg.memdesc<64x128xbf16> loc(#l)
      %w_3 = ttg.memdesc_trans %w_2 : !ttg.memdesc<64x128xbf16> -> !ttg.memdesc<128x64xbf16> loc(#l)
      %d = ttng.warp_group_dot {left}, %w_3, %acc {{isAsync = true}} : !ttg.memdesc<64x64xbf16> loc(#l)
      %d_4:3 = ttng.warp_group_dot_wait %d, %x_2, %w_3 {{pendings = {pendings} : i32}} : tensor<64x128xf32> loc(#l)
      %x_5 = ttg.memdesc_index %x[%n] : !ttg.memdesc<{buffers}x64x64xbf16> -> !ttg.memdesc<64x64xbf16> loc(#l)
      %t4 = ttg.async_copy_global_to_local %p, %x_5 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#l)
      %w_6 = ttg.memdesc_index %w[%n] : !ttg.memdesc<3x64x128xbf16> -> !ttg.memdesc<64x128xbf16> loc(#l)
      %t5 = ttg.async_copy_global_to_local %p, %w_6 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16> loc(#l)
      scf.yield %d_4#0 : tensor<64x128xf32> loc(#l)
    }} loc(#l)
"""


@pytest.mark.parametrize(
    ("buffers", "left", "pendings", "expected"),
    [(2, "%x_2", 1, ["%x"]), (3, "%x_2", 1, []), (2, "%x_2", 0, []), (2, "%x_r", 1, [])],
    ids=["as many buffers as steps ahead", "one more", "waits for the products", "from registers"],
)
def test_an_operand_needs_a_buffer_more_than_it_is_prefetched_ahead(buffers, left, pendings, expected):
    assert overwritten(TTGIR.format(buffers=buffers, left=left, pendings=pendings)) == expected
