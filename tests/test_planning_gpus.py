"""Plans for NVIDIA GPUs that are not here: names, collectives of a program's text, and a compiled step."""

import functools

import jax
import jax.numpy as jnp
import pytest

import commands
from benchmarks import plan_check
from benchmarks.collectives import Collective, collectives
from benchmarks.hlo_traffic import traffic
from tarflow_jax.planning import open_topology
from tarflow_jax.planning.flops import program_flops

# On 2 hosts of 4 GPUs, a loop of 3 rounds: cuDNN's attention and a product by cuBLAS, each with room to work, a fusion
# by Triton and a gather in pairs; then a sum over all GPUs, another over the pairs that hosts make, and a permutation.
PROGRAM = """\
HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(bf16[2,16,1,8]{3,2,1,0})->f32[16]{0}}

%gemm_fusion_dot.1_computation (parameter_0: bf16[32,8], parameter_1: bf16[8,8]) -> bf16[32,8] {
  %parameter_0 = bf16[32,8]{1,0} parameter(0)
  %parameter_1 = bf16[8,8]{1,0} parameter(1)
  ROOT %dot.1 = bf16[32,8]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (param: (s32[], bf16[2,16,1,8], bf16[8,8])) -> (s32[], bf16[2,16,1,8], bf16[8,8]) {
  %param = (s32[], bf16[2,16,1,8]{3,2,1,0}, bf16[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%param), index=0
  %x = bf16[2,16,1,8]{3,2,1,0} get-tuple-element(%param), index=1
  %w = bf16[8,8]{1,0} get-tuple-element(%param), index=2
  %attention = (bf16[2,1,16,8]{3,1,2,0}, u8[64]{0}) custom-call(%x, %x, %x), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"operation_queue_id":"0"}
  %out = bf16[2,1,16,8]{3,1,2,0} get-tuple-element(%attention), index=0
  %rows = bf16[32,8]{1,0} bitcast(%out)
  %product = (bf16[32,8]{1,0}, s8[4194304]{0}) custom-call(%rows, %w), custom_call_target="__cublas$gemm", backend_config={"operation_queue_id":"0"}
  %result = bf16[32,8]{1,0} get-tuple-element(%product), index=0
  %gemm_fusion_dot.1 = bf16[32,8]{1,0} fusion(%result, %w), kind=kCustom, calls=%gemm_fusion_dot.1_computation, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %all-gather-start.1 = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true
  %all-gather-done.1 = bf16[16,8]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %tuple.1 = (s32[], bf16[2,16,1,8]{3,2,1,0}, bf16[8,8]{1,0}) tuple(%i, %x, %w)
}

%condition (param.1: (s32[], bf16[2,16,1,8], bf16[8,8])) -> pred[] {
  %param.1 = (s32[], bf16[2,16,1,8]{3,2,1,0}, bf16[8,8]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: bf16[2,16,1,8], b: bf16[8,8], c: f32[16]) -> f32[16] {
  %a = bf16[2,16,1,8]{3,2,1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %c = f32[16]{0} parameter(2)
  %zero = s32[] constant(0)
  %tuple.2 = (s32[], bf16[2,16,1,8]{3,2,1,0}, bf16[8,8]{1,0}) tuple(%zero, %a, %b)
  %while.1 = (s32[], bf16[2,16,1,8]{3,2,1,0}, bf16[8,8]{1,0}) while(%tuple.2), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce-start.1 = f32[16]{0} all-reduce-start(%c), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  %all-reduce-done.1 = f32[16]{0} all-reduce-done(%all-reduce-start.1)
  %all-reduce-start.2 = f32[16]{0} all-reduce-start(%all-reduce-done.1), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true, to_apply=%add
  %all-reduce-done.2 = f32[16]{0} all-reduce-done(%all-reduce-start.2)
  ROOT %permuted = f32[16]{0} collective-permute(%all-reduce-done.2), channel_id=4, source_target_pairs={{0,4},{4,0}}
}
"""  # noqa: E501


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:8x", "h100:8x0", "h100:8x4x2"])
def test_names_of_gpus(name):
    with pytest.raises(ValueError, match=f"no topology '{name}'.*expected one such as v5e:16x16, h100:8 or h100:8x4"):
        open_topology(name)


def test_gpus_have_no_slices():
    with pytest.raises(ValueError, match="only TPU topologies have slices"):
        open_topology("h100:8", num_slices=2)


def test_collectives_of_a_programs_text():
    assert collectives(PROGRAM, num_devices=8) == {
        "all-gather": Collective(3, 3 * 128),
        "all-reduce": Collective(2, 2 * 64 * 7 / 8 + 2 * 64 / 2),
        "collective-permute": Collective(1, 64),
    }


def test_bytes_moved_by_a_programs_text():
    attention, matmul, gather = 4 * 512, 512 + 128 + 512, 128 + 256
    assert sum(traffic(PROGRAM).values()) == 3 * (attention + 2 * matmul + gather) + 3 * (64 + 64)


def test_flops_of_cudnns_attention():
    pytest.importorskip("jax_cuda12_plugin")

    def attend(x, is_causal=True):
        return jax.nn.dot_product_attention(x, x, x, is_causal=is_causal, implementation="cudnn").sum()

    x = jax.ShapeDtypeStruct((2, 256, 3, 64), jnp.bfloat16)
    matmul = 2 * 2 * 3 * 256**2 * 64
    assert program_flops(jax.make_jaxpr(attend)(x)) == 2 * matmul
    assert program_flops(jax.make_jaxpr(jax.grad(attend))(x)) == 7 * matmul
    assert program_flops(jax.make_jaxpr(functools.partial(attend, is_causal=False))(x)) == 2 * matmul


@pytest.mark.slow
def test_a_step_compiles_for_gpus_that_are_not_here_with_cudnns_attention(tmp_path):
    pytest.importorskip("jax_cuda12_plugin")
    flags = {"num_blocks": 1, "dtype": "bfloat16", "patch_size": 1, "image_size": "(16, 16)", "triangular": False}
    program = (
        "import os, runpy, jax; real = jax.stages.Compiled.memory_analysis; "
        "jax.stages.Compiled.memory_analysis = lambda compiled: "
        "(open(os.environ['TEXT'], 'w').write(compiled.as_text()), real(compiled))[1]; "
        "runpy.run_module('launch.plan', run_name='__main__', alter_sys=True)"
    )
    code, out, err = commands.run(
        "-c",
        program,
        "--config=configs/digits.py:smoke",
        "--topology=h100:4x2",
        *(f"--config.model.{name}={value}" for name, value in flags.items()),
        "--config.optimizer.name=adamw",
        "--config.optimizer.muon_learning_rate=0.",
        TEXT=str(tmp_path / "text"),
    )
    assert code == 0, err
    text = (tmp_path / "text").read_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert {"all-reduce"} <= collectives(text, num_devices=8).keys()
    assert "device-hours" in out


def test_a_plan_is_held_against_what_a_gpu_measured():
    figures = {
        "state_bytes": {"parameters": 9 * 2**30},
        "temporary_bytes": 0.9 * 2**30,
        "code_bytes": 0.1 * 2**30,
        "model_flops": 30e12,
        "device_flops": 100e12,
    }
    text, holds = plan_check.verdict(figures, int(10.9 * 2**30), 0.5)
    assert holds
    assert "+9.0%" in text
    assert "60% MFU" in text
    text, holds = plan_check.verdict(figures, int(11.2 * 2**30), 0.5)
    assert not holds
    assert "more than 10 % apart" in text
