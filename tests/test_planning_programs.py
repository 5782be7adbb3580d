"""Collectives and memory traffic of compiled texts and FLOPs of jaxprs, against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.collectives import Collective, collectives
from benchmarks.hlo_traffic import traffic
from tarflow_jax.planning.flops import program_flops
from tarflow_jax.runtime import make_mesh
from tarflow_jax.runtime.kernels import splash

# A loop of 3 rounds: a 4 x 8 slice of a 3 x 4 x 8 buffer is read by a fusion, all-reduced over pairs and kept on chip.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_slice (param_0.1: f32[3,4,8], param_1.1: s32[]) -> f32[4,8] {
  %param_0.1 = f32[3,4,8]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(1)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = f32[1,4,8]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.1, %constant.1, %constant.1), dynamic_slice_sizes={1,4,8}
  ROOT %bitcast.1 = f32[4,8]{1,0:T(8,128)S(1)} bitcast(%dynamic-slice.1)
}

%all-reduce-scatter.1 (param_0.4: bf16[16]) -> bf16[4] {
  %param_0.4 = bf16[16]{0:T(256)} parameter(0)
  %all-reduce.2 = bf16[16]{0:T(256)} all-reduce(%param_0.4), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  %index = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.2 = bf16[4]{0:T(256)} dynamic-slice(%all-reduce.2, %index), dynamic_slice_sizes={4}
}

%body (param.2: (s32[], f32[3,4,8])) -> (s32[], f32[3,4,8]) {
  %param.2 = (s32[]{:T(128)S(1)}, /*index=1*/f32[3,4,8]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(1)} get-tuple-element(%param.2), index=0
  %stack = f32[3,4,8]{2,1,0:T(8,128)} get-tuple-element(%param.2), index=1
  %fusion.1 = f32[4,8]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %all-reduce.1 = f32[4,8]{1,0:T(8,128)S(1)} all-reduce(%fusion.1), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %tuple.1 = (s32[]{:T(128)S(1)}, f32[3,4,8]{2,1,0:T(8,128)}) tuple(%i, %stack)
}

%condition (param.3: (s32[], f32[3,4,8])) -> pred[] {
  %param.3 = (s32[]{:T(128)S(1)}, f32[3,4,8]{2,1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)S(1)} get-tuple-element(%param.3), index=0
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (x: f32[3,4,8], y: bf16[16]) -> bf16[64] {
  %x = f32[3,4,8]{2,1,0:T(8,128)} parameter(0)
  %y = bf16[16]{0:T(256)} parameter(1)
  %zero = s32[]{:T(128)S(1)} constant(0)
  %tuple.2 = (s32[]{:T(128)S(1)}, f32[3,4,8]{2,1,0:T(8,128)}) tuple(%zero, %x)
  %while.1 = (s32[]{:T(128)S(1)}, f32[3,4,8]{2,1,0:T(8,128)}) while(%tuple.2), condition=%condition, body=%body
  %token = token[] after-all()
  %send.1 = (bf16[16]{0:T(256)}, u32[], token[]) send(%y, %token), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %fusion.2 = bf16[4]{0:T(256)S(1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %all-gather.1 = bf16[64]{0:T(256)} all-gather(%y), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, dimensions={0}
}
"""  # noqa: E501


def test_collectives_of_a_programs_text():
    assert collectives(PROGRAM, num_devices=8, num_slices=2) == {
        # Of S bytes an all-reduce of n sends 2 S (n - 1) / n.
        "all-reduce": Collective(count=3, bytes=3 * 128),
        "all-reduce between slices": Collective(count=1, bytes=32),
        "all-gather": Collective(count=1, bytes=3 * 32),
        "reduce-scatter": Collective(count=1, bytes=32 * 3 / 4),
    }


def test_bytes_moved_by_a_programs_text():
    # The loop's slice; the buffer that the send, the scatter and the gather read; what the gather writes.
    assert sum(traffic(PROGRAM).values()) == 3 * (4 * 8 * 4) + 3 * (2 * 16) + 2 * 64


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{}", 4),  # all of a slice
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['a'=2,'b'=4] {'a'}", 2),
        ("mesh['a'=8] {'a':(1)2}", 2),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}", 4),
    ],
)
def test_sizes_of_the_groups_that_exchange_data(groups, size):
    text = PROGRAM.replace("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", groups)
    assert collectives(text, num_devices=8, num_slices=2)["all-gather"].bytes == (size - 1) * 32


# A gather that begins, goes on beside the products of a loop of 5 rounds, and ends: once, however many pieces name it.
PIECES = """\
HloModule jit_step, is_scheduled=true

%begin (param_0.1: f32[4,8]) -> (f32[4,8], f32[16,8], u32[]) {
  %param_0.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = f32[16,8]{1,0:T(8,128)} all-gather(%param_0.1), channel_id=25, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.1 = (f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (param_0.2: f32[4,8], param_1.2: f32[16,8], param_2.2: f32[8,8], param_3.2: u32[]) -> (f32[8,8], f32[4,8], f32[16,8], f32[16,8], u32[]) {
  %param_2.2 = f32[8,8]{1,0:T(8,128)} parameter(2)
  %convolution.1 = f32[8,8]{1,0:T(8,128)S(1)} convolution(%param_2.2, %param_2.2), dim_labels=bf_io->bf
  %param_0.2 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %param_1.2 = f32[16,8]{1,0:T(8,128)} parameter(1)
  %all-gather.2 = f32[16,8]{1,0:T(8,128)} all-gather(%param_0.2), channel_id=25, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  %param_3.2 = u32[]{:S(2)} parameter(3)
  ROOT %tuple.1 = (f32[8,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, u32[]{:S(2)}) tuple(%convolution.1, %param_0.2, %param_1.2, %all-gather.2, %param_3.2)
}

%end (param_0.3: f32[4,8], param_1.3: f32[16,8], param_2.3: u32[]) -> f32[16,8] {
  %param_0.3 = f32[4,8]{1,0:T(8,128)} parameter(0)
  %param_1.3 = f32[16,8]{1,0:T(8,128)} parameter(1)
  %all-gather.3 = f32[16,8]{1,0:T(8,128)} all-gather(%param_0.3), channel_id=25, replica_groups=[1,4]<=[4], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  %param_2.3 = u32[]{:S(2)} parameter(2)
  ROOT %custom-call.2 = f32[16,8]{1,0:T(8,128)} custom-call(%param_0.3, %param_1.3, %all-gather.3, %param_2.3), custom_call_target="AsyncCollectiveDone"
}

%body (state: (f32[4,8], f32[16,8], f32[8,8], u32[])) -> (f32[4,8], f32[16,8], f32[8,8], u32[]) {
  %state = (f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) parameter(0)
  %shard = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state), index=0
  %whole = f32[16,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %square = f32[8,8]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %flag = u32[]{:S(2)} get-tuple-element(%state), index=3
  %fusion.1 = (f32[8,8]{1,0:T(8,128)S(1)}, f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%shard, %whole, %square, %flag), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (3, {})}, calls=%go_on
  ROOT %tuple.2 = (f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) tuple(%shard, %whole, %square, %flag)
}

ENTRY %main (x: f32[4,8], y: f32[8,8]) -> f32[16,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %y = f32[8,8]{1,0:T(8,128)} parameter(1)
  %start = (f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %while.1 = (f32[4,8]{1,0:T(8,128)}, f32[16,8]{1,0:T(8,128)}, f32[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) while(%start), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %shard.1 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%while.1), index=0
  %whole.1 = f32[16,8]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %flag.1 = u32[]{:S(2)} get-tuple-element(%while.1), index=3
  ROOT %done = f32[16,8]{1,0:T(8,128)} fusion(%shard.1, %whole.1, %flag.1), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%end
}
"""  # noqa: E501


def test_a_collective_in_pieces_is_counted_once():
    shard, whole, square = 4 * 8 * 4, 16 * 8 * 4, 8 * 8 * 4
    assert collectives(PIECES, num_devices=4) == {"all-gather": Collective(count=1, bytes=3 * shard)}
    # The gather reads a shard and writes the whole; each round's matmul reads its own operand.
    assert sum(traffic(PIECES).values()) == shard + whole + 5 * square


# A matmul of two kernels, one a slice of a stack, which fusions within its fusion reshape.
RESHAPED = """\
HloModule jit_step, is_scheduled=true

%renamed (bitcast_input.1: f32[8,2,4]) -> f32[8,8] {
  %bitcast_input.1 = f32[8,2,4]{2,1,0:T(8,128)} parameter(0)
  ROOT %bitcast.1 = f32[8,8]{1,0:T(8,128)} bitcast(%bitcast_input.1)
}

%layer (param_0.1: f32[3,8,8], param_1.1: s32[]) -> f32[8,8] {
  %param_0.1 = f32[3,8,8]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)S(1)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  %dynamic-slice.1 = f32[1,8,8]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.1, %constant.1, %constant.1), dynamic_slice_sizes={1,8,8}
  ROOT %bitcast.2 = f32[8,8]{1,0:T(8,128)} bitcast(%dynamic-slice.1)
}

%products (param_0.2: f32[8,2,4], param_1.2: f32[3,8,8], param_2.2: s32[]) -> f32[8,8] {
  %param_0.2 = f32[8,2,4]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = f32[3,8,8]{2,1,0:T(8,128)} parameter(1)
  %param_2.2 = s32[]{:T(128)S(1)} parameter(2)
  %fusion.1 = f32[8,8]{1,0:T(8,128)} fusion(%param_0.2), kind=kLoop, calls=%renamed
  %fusion.2 = f32[8,8]{1,0:T(8,128)} fusion(%param_1.2, %param_2.2), kind=kLoop, calls=%layer
  ROOT %convolution.1 = f32[8,8]{1,0:T(8,128)S(1)} convolution(%fusion.1, %fusion.2), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[8,2,4], y: f32[3,8,8], i: s32[]) -> f32[8,8] {
  %x = f32[8,2,4]{2,1,0:T(8,128)} parameter(0)
  %y = f32[3,8,8]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(1)} parameter(2)
  ROOT %fusion.3 = f32[8,8]{1,0:T(8,128)S(1)} fusion(%x, %y, %i), kind=kOutput, calls=%products
}
"""  # noqa: E501


def test_a_matmul_reads_operands_that_inner_fusions_reshape():
    assert sum(traffic(RESHAPED).values()) == 8 * 8 * 4 + 8 * 8 * 4


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="length of a loop"):
        collectives(PROGRAM.replace("direction=LT", "direction=GT"), num_devices=8)


def test_flops_count_loops_by_length_and_a_shard_map_by_devices():
    mesh = make_mesh(4, devices=jax.devices()[:4])
    rows = jax.sharding.PartitionSpec("data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(rows, None), out_specs=rows)
    def product(x, kernel):
        return x @ kernel

    def loop(x, kernel):
        return jax.lax.scan(lambda carry, _: (product(carry, kernel), None), x, None, length=5)[0]

    jaxpr = jax.make_jaxpr(loop)(jnp.ones((8, 3)), jnp.ones((3, 3)))
    assert program_flops(jaxpr) == 5 * 2 * 8 * 3 * 3


def test_matmuls_that_no_result_needs_are_not_counted():
    x = jnp.ones((8, 8))

    def both(x):
        used, unused = x @ x, x @ x  # as what a gradient computes again and then finds kept
        return jax.lax.scan(lambda carry, _: ((carry[0] @ x, carry[1] @ x), None), (used, unused), length=3)[0][0]

    assert program_flops(jax.make_jaxpr(both)(x)) == (1 + 3) * 2 * 8**3


@pytest.mark.parametrize("causal", [True, False])
def test_attention_counts_whole(causal):
    x = jnp.zeros((2, 3, 1024, 64), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(functools.partial(splash, causal=causal))(x, x, x)
    assert program_flops(jaxpr) == 2 * 2 * 2 * 3 * 1024**2 * 64
