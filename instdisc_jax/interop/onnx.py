"""Encoders as ONNX files.

A function is traced, and each operation of its jaxpr becomes an ONNX node. Whatever does not depend
on the images, such as the weights of batch normalization, is computed here. Of JAX's some hundred
operations those that encoders need are known, which is little code; exporters for all of JAX depend
on versions of other packages that this project cannot use.
"""

from collections.abc import Callable
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OPSET = 17
_BATCH = 7919  # a size that no other dimension has
_SAME_INPUTS = {'add': 'Add', 'sub': 'Sub', 'mul': 'Mul', 'div': 'Div', 'max': 'Max', 'exp': 'Exp',
                'erf': 'Erf', 'neg': 'Neg', 'copy': 'Identity',
                'stop_gradient': 'Identity'}
_INLINED = {'jit': 'jaxpr', 'custom_vjp_call': 'call_jaxpr', 'custom_jvp_call': 'call_jaxpr'}


def export(function: Callable[[Any], dict[str, Any]], shape: tuple[int, int, int],
           metadata: dict[str, str]) -> bytes:
  """The ONNX model of a function of images.

  Args:
    function: [B, H, W, 3] uint8 -> {name: [B, F] float32}.
    shape: (H, W, 3).
    metadata: text that the file keeps.

  Returns:
    The file's content; its input is 'images', of any batch size.

  Raises:
    NotImplementedError: the function uses an operation that is not known here.
  """
  onnx: Any = importlib.import_module('onnx')
  images = jax.ShapeDtypeStruct((_BATCH, *shape), jnp.uint8)
  closed, out = jax.make_jaxpr(function, return_shape=True)(images)
  graph = _Graph(onnx)
  results = graph.run(closed.jaxpr, closed.consts, ['images'])
  outputs = []
  for name, result, kind in zip(out, results, out.values()):
    graph.node('Identity', [result], output=name)
    outputs.append(onnx.helper.make_tensor_value_info(
        name, onnx.TensorProto.FLOAT, ['B', *kind.shape[1:]]))
  given = onnx.helper.make_tensor_value_info('images', onnx.TensorProto.UINT8, ['B', *shape])
  model = onnx.helper.make_model(
      onnx.helper.make_graph(graph.nodes, 'encoder', [given], outputs, graph.constants),
      opset_imports=[onnx.helper.make_opsetid('', OPSET)], ir_version=8,
      producer_name='instdisc_jax')
  onnx.helper.set_model_props(model, metadata)
  onnx.checker.check_model(model)
  return model.SerializeToString()


class _Graph:
  """The nodes and constants of a model. A value is an array, or the name of a node's output."""

  def __init__(self, onnx):
    self.nodes, self.constants, self._onnx = [], [], onnx

  def node(self, kind, inputs, output=None, **attributes):
    """Adds a node and returns the name of its output."""
    output = output or f'{kind}_{len(self.nodes)}'
    names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
    self.nodes.append(self._onnx.helper.make_node(kind, names, [output], **attributes))
    return output

  def run(self, jaxpr, consts, inputs):
    """The values of the results of a jaxpr."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*map(np.asarray, consts), *inputs]))
    value = lambda x: known[x] if not hasattr(x, 'val') else np.asarray(x.val, x.aval.dtype)
    for equation in jaxpr.eqns:
      results = self._apply(equation, [value(x) for x in equation.invars])
      known.update(zip(equation.outvars, results))
    return [value(x) for x in jaxpr.outvars]

  def _constant(self, x):
    name = f'constant_{len(self.constants)}'
    self.constants.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(x), name))
    return name

  def _apply(self, equation, inputs):
    """The results of an equation."""
    name, params = equation.primitive.name, equation.params
    if name == 'platform_index':
      return [np.int32(params['platforms'].index(None) if None in params['platforms'] else
                       len(params['platforms']) - 1)]
    if name == 'cond' and not isinstance(inputs[0], str):
      branch = params['branches'][int(inputs[0])]
      return self.run(branch.jaxpr, branch.consts, inputs[1:])
    if not any(isinstance(x, str) for x in inputs):
      found = equation.primitive.bind(*map(jnp.asarray, inputs), **params)
      return [np.asarray(x) for x in (found if equation.primitive.multiple_results else [found])]
    if name in _INLINED:
      inner = params[_INLINED[name]]
      return self.run(getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ()), inputs)
    operands = [x.aval for x in equation.invars]
    if name in _SAME_INPUTS:
      return [self.node(_SAME_INPUTS[name], inputs)]
    if not hasattr(self, f'_{name}'):
      raise NotImplementedError(f'{name} as ONNX')
    return [getattr(self, f'_{name}')(inputs, params, operands, equation.outvars[0].aval)]

  def _rsqrt(self, inputs, params, operands, result):
    return self.node('Reciprocal', [self.node('Sqrt', inputs)])

  def _convert_element_type(self, inputs, params, operands, result):
    kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(result.dtype))
    return self.node('Cast', inputs, to=kind)

  def _broadcast_in_dim(self, inputs, params, operands, result):
    """New dimensions of size 1; nodes with several inputs broadcast by themselves."""
    shape = [1] * len(result.shape)
    for dim, place in zip(operands[0].shape, params['broadcast_dimensions']):
      shape[place] = dim
    return self._to_shape(inputs[0], shape)

  def _reshape(self, inputs, params, operands, result):
    return self._to_shape(inputs[0], result.shape)

  def _to_shape(self, x, shape):
    shape = [-1 if dim == _BATCH else dim for dim in shape]
    if any(dim > 0 and dim % _BATCH == 0 for dim in shape):
      raise NotImplementedError('a dimension that joins the batch with another as ONNX')
    return self.node('Reshape', [x, np.array(shape, np.int64)])

  def _transpose(self, inputs, params, operands, result):
    return self.node('Transpose', inputs, perm=list(params['permutation']))

  def _reduce_sum(self, inputs, params, operands, result):
    return self.node('ReduceSum', [inputs[0], np.array(params['axes'], np.int64)], keepdims=0)

  def _slice(self, inputs, params, operands, result):
    """The batch is always whole."""
    parts = zip(params['start_indices'], params['limit_indices'],
                params['strides'] or [1] * len(result.shape))
    chosen = [(axis, *part) for axis, part in enumerate(parts)
              if operands[0].shape[axis] != _BATCH]
    axes, *parts = (np.array(part, np.int64) for part in zip(*chosen))
    return self.node('Slice', [inputs[0], parts[0], parts[1], axes, parts[2]])

  def _concatenate(self, inputs, params, operands, result):
    return self.node('Concat', inputs, axis=params['dimension'])

  def _reduce_max(self, inputs, params, operands, result):
    return self.node('ReduceMax', inputs, axes=list(params['axes']), keepdims=0)

  def _erfc(self, inputs, params, operands, result):
    one = np.ones((), operands[0].dtype)
    return self.node('Sub', [one, self.node('Erf', inputs)])

  def _square(self, inputs, params, operands, result):
    return self.node('Mul', [inputs[0], inputs[0]])

  def _squeeze(self, inputs, params, operands, result):
    return self._to_shape(inputs[0], result.shape)

  def _pad(self, inputs, params, operands, result):
    low, high, inner = zip(*params['padding_config'])
    if any(inner) or min(low + high) < 0:
      raise NotImplementedError('padding between values as ONNX')
    return self.node('Pad', [inputs[0], np.array(low + high, np.int64), inputs[1]])

  def _dot_general(self, inputs, params, operands, result):
    (left, right), (left_batch, right_batch) = params['dimension_numbers']
    letters = iter('abcdefghijklmnopqrstuvwxyz')
    of_left = [next(letters) for _ in operands[0].shape]
    of_right = [next(letters) for _ in operands[1].shape]
    for i, j in [*zip(left, right), *zip(left_batch, right_batch)]:
      of_right[j] = of_left[i]
    batch = [of_left[i] for i in left_batch]
    kept = [x for x in of_left if x not in of_right] + [x for x in of_right if x not in of_left]
    equation = f"{''.join(of_left)},{''.join(of_right)}->{''.join(batch + kept)}"
    return self.node('Einsum', inputs, equation=equation)

  def _conv_general_dilated(self, inputs, params, operands, result):
    numbers, pads = params['dimension_numbers'], params['padding']
    if set(params['lhs_dilation']) != {1}:
      raise NotImplementedError('a transposed convolution as ONNX')
    if isinstance(inputs[1], str):
      raise NotImplementedError('a convolution whose weights depend on the images as ONNX')
    x = self.node('Transpose', inputs[:1], perm=list(numbers.lhs_spec))
    x = self.node('Conv', [x, inputs[1].transpose(numbers.rhs_spec)],
                  strides=list(params['window_strides']), dilations=list(params['rhs_dilation']),
                  pads=[low for low, _ in pads] + [high for _, high in pads],
                  group=params['feature_group_count'])
    return self.node('Transpose', [x], perm=np.argsort(numbers.out_spec).tolist())

  def _reduce_window_max(self, inputs, params, operands, result):
    """Max pooling of [B, H, W, C]."""
    inner = lambda name: list(params[name])[1:3]
    pads = inner('padding')
    x = self.node('Transpose', inputs, perm=[0, 3, 1, 2])
    x = self.node('MaxPool', [x], kernel_shape=inner('window_dimensions'),
                  strides=inner('window_strides'), dilations=inner('window_dilation'),
                  pads=[low for low, _ in pads] + [high for _, high in pads])
    return self.node('Transpose', [x], perm=[0, 2, 3, 1])
