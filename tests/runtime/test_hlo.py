import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import pytest

from instdisc_jax.runtime import hlo
from instdisc_jax.runtime import mesh as mesh_lib


def _costs(fn, *arrays, **options):
  return hlo.costs(jax.jit(fn, **options).lower(*arrays).compile().as_text())


def test_a_product_has_its_flops_and_moves_its_operands_and_its_result():
  found = _costs(jnp.dot, jnp.zeros((64, 256)), jnp.zeros((256, 128)))
  assert sum(found.flops.values()) == 2 * 64 * 256 * 128
  assert found.bytes == 4 * (64 * 256 + 256 * 128 + 64 * 128)
  assert found.collectives == ()


def test_a_loop_counts_as_often_as_it_runs():
  step = lambda i, x: jnp.sin(x @ x)
  once = _costs(lambda x: step(0, x), jnp.zeros((64, 64)))
  found = _costs(lambda x: lax.fori_loop(0, 7, step, x), jnp.zeros((64, 64)))
  assert sum(found.flops.values()) == 7 * sum(once.flops.values()) == 7 * 2 * 64**3
  assert 7 * once.bytes <= found.bytes < 9 * once.bytes


@pytest.mark.parametrize('stride', [1, 2])
def test_a_convolution_and_its_gradients_have_three_times_its_flops(stride):
  images, kernel = jnp.zeros((4, 16, 16, 8)), jnp.zeros((3, 3, 8, 32))

  def convolve(images, kernel):
    return lax.conv_general_dilated(images, kernel, (stride, stride), 'SAME',
                                    dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

  expected = 2 * 4 * (16 // stride) ** 2 * 32 * 9 * 8
  assert sum(_costs(convolve, images, kernel).flops.values()) == expected
  gradient = jax.grad(lambda *x: (convolve(*x) ** 2).sum(), (0, 1))
  found = sum(_costs(gradient, images, kernel).flops.values())
  assert found == pytest.approx(3 * expected, rel=0.1)


def test_a_slice_reads_its_part_and_an_update_in_place_writes_its_part():
  rows = jnp.zeros((100_000, 8))
  read = _costs(lambda rows, i: lax.dynamic_slice_in_dim(rows, i, 10) * 2, rows, 3)
  assert read.bytes < 1000
  write = _costs(lambda rows, i: lax.dynamic_update_slice_in_dim(rows, jnp.ones((10, 8)), i, 0),
                 rows, 3, donate_argnums=0)
  assert write.bytes < 2000
  assert _costs(lambda rows: rows * 2, rows).bytes == 2 * rows.nbytes


def test_collectives_are_counted_with_the_larger_of_in_and_out():
  mesh = mesh_lib.make()
  spec = jax.P(mesh_lib.AXIS)

  def device_part(x):  # [3, 5] on each of 8
    everything = lax.all_gather(x, mesh_lib.AXIS, tiled=True)
    return lax.fori_loop(0, 4, lambda i, x: lax.psum(x, mesh_lib.AXIS) / 8, everything)

  mapped = jax.shard_map(device_part, mesh=mesh, in_specs=spec, out_specs=jax.P(),
                         check_vma=False)
  array = jax.ShapeDtypeStruct((24, 5), jnp.float32, sharding=NamedSharding(mesh, spec))
  found = {c.kind: (c.count, c.bytes) for c in _costs(mapped, array).collectives}
  assert found == {'all-gather': (1, 480), 'all-reduce': (4, 4 * 480)}


GPU = """
HloModule jit_step

%fused_add (p0: f32[8,4], p1: f32[8,4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[8,4]{1,0} parameter(1)
  ROOT %add = f32[8,4]{1,0} add(%p0, %p1)
}

ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %gemm = (f32[8,4]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  %c = f32[8,4]{1,0} get-tuple-element(%gemm), index=0
  %start = f32[8,4]{1,0} all-reduce-start(%c), to_apply=%add
  %done = f32[8,4]{1,0} all-reduce-done(%start)
  ROOT %sum = f32[8,4]{1,0} fusion(%c, %done), kind=kLoop, calls=%fused_add
}
"""  # noqa: E501

TPU = """
HloModule jit_step

ENTRY %main (a: bf16[4,8,8,16], k: bf16[3,3,16,32]) -> bf16[4,8,8,32] {
  %a = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %k = bf16[3,3,16,32]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[3,3,16,32]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[3,3,16,32]{3,2,1,0}, u32[]{:S(2)}) copy-start(%k)
  %near = bf16[3,3,16,32]{3,2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  ROOT %c = bf16[4,8,8,32]{3,0,2,1:T(8,128)(2,1)} convolution(%a, %near), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}
"""  # noqa: E501


def test_the_texts_of_other_compilers_are_read():
  gpu = hlo.costs(GPU)
  assert gpu.flops == {'highest': 2 * 8 * 16 * 4}
  assert gpu.collectives == (hlo.Collective('all-reduce', 1, 128),)
  tpu = hlo.costs(TPU)
  assert tpu.flops == {'bfloat16': 2 * 4 * 8 * 8 * 32 * 9 * 16}
  kernel, images, result = (2 * n for n in (9 * 16 * 32, 4 * 64 * 16, 4 * 64 * 32))
  assert tpu.bytes == kernel + images + result  # the kernel is read once, into memory on the chip


LOOP = """
HloModule jit_step

%condition (p: (s32[], f32[8,8], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %end = s32[]{:T(128)} get-tuple-element(%p), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%body (p: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tuple = (s32[]{:T(128)}, f32[8,8]{1,0}, s32[]{:T(128)}) tuple(%p, %y, %p)
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %end = s32[]{:T(128)} constant(6)
  %tuple = (s32[]{:T(128)}, f32[8,8]{1,0}, s32[]{:T(128)}) tuple(%first, %x, %end)
  %while = (s32[]{:T(128)}, f32[8,8]{1,0}, s32[]{:T(128)}) while(%tuple), condition=%condition, body=%body
  ROOT %y = f32[8,8]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_a_loop_whose_length_is_not_stated_is_counted_by_its_condition():
  assert hlo.costs(LOOP).flops == {'default': 5 * 2 * 8**3}
  unknown = LOOP.replace('constant(6)', 'parameter(6)')
  assert hlo.costs(unknown).flops == {'default': 2 * 8**3}


ATTENTION = """
HloModule jit_step

ENTRY %main (q: f16[4,256,1,128], kv: f16[4,1000,1,128]) -> f16[4,256,1,128] {
  %q = f16[4,256,1,128]{3,2,1,0} parameter(0)
  %kv = f16[4,1000,1,128]{3,2,1,0} parameter(1)
  %fmha = (f16[4,256,1,128]{3,2,1,0}, f32[4,1,256]{2,1,0}, u8[0]{0}) custom-call(%q, %kv, %kv), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/softmax_loss/attention"}
  ROOT %out = f16[4,256,1,128]{3,2,1,0} get-tuple-element(%fmha), index=0
}
"""  # noqa: E501

PALLAS = """
HloModule jit_step

ENTRY %main (q: bf16[256,128], rows: bf16[1000,128]) -> f32[256,128] {
  %q = bf16[256,128]{1,0} parameter(0)
  %rows = bf16[1000,128]{1,0} parameter(1)
  ROOT %sums = f32[256,128]{1,0} custom-call(%q, %rows), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/softmax_loss/pallas_call"}, backend_config={"custom_call_config":{"body":"AAAA","cost_estimate":{"flops":"131072000","transcendentals":"256000","bytes_accessed":"777000"}}}
}
"""  # noqa: E501


def test_fused_attention_reads_its_rows_once_and_has_the_flops_of_two_products():
  queries, rows = 4 * 256 * 128 * 2, 4 * 1000 * 128 * 2
  found, = hlo.kernels(ATTENTION)
  assert (found.opcode, found.times) == ('custom-call __cudnn$fmhaSoftmax', 1)
  assert found.source == 'jit(step)/softmax_loss/attention'
  assert found.flops == {'bfloat16': 4 * 4 * 256 * 1000 * 128}
  assert queries + rows < found.bytes <= 2 * queries + rows + 4 * 4 * 256
  assert found.cycles is None and found.largest == queries


def test_a_pallas_kernel_s_costs_are_those_that_it_states():
  found, = hlo.kernels(PALLAS)
  assert found.flops == {'bfloat16': 131072000}
  assert found.bytes == 777000


def test_kernels_add_up_to_the_costs_of_their_program():
  step = lambda i, x: jnp.sin(x @ x)
  text = jax.jit(lambda x: lax.fori_loop(0, 7, step, x)).lower(
      jnp.zeros((64, 64))).compile().as_text()
  total = hlo.costs(text)
  assert sum(kernel.bytes for kernel in hlo.kernels(text)) == total.bytes
  assert sum(sum(kernel.flops.values()) for kernel in hlo.kernels(text)) == sum(
      total.flops.values())
