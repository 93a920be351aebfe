"""What a compiled program does, read from its text: FLOPs, bytes through memory, collectives.

The text is XLA's optimized HLO, as `jax.stages.Compiled.as_text()` gives it. Instructions at its
top level are kernels: each reads its operands from memory and writes its result there. Those in a
fusion are part of one kernel. A loop counts as often as it runs, if the compiler knows how often,
else once.
"""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import NamedTuple

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BITS = {'pred': 8, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
         'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64,
         'c64': 64, 'c128': 128, 'f8e4m3fn': 8, 'f8e5m2': 8, 'token': 0, 'opaque': 0}
# Instructions that move nothing: names for parts of memory, and ends of what was started before.
_FREE = frozenset((
    'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant', 'after-all', 'partition-id',
    'replica-id', 'iota', 'opt-barrier', 'domain', 'copy-done', 'slice-done', 'async-done',
    'dynamic-slice-done', 'send-done', 'recv-done', *(f'{kind}-done' for kind in COLLECTIVES)))
_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,<=]*)\](\{[^}]*\})?')
_LINE = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')


class _Array(NamedTuple):
  """An array in the program's text."""
  dtype: str
  shape: tuple[int, ...]
  layout: str

  @property
  def bytes(self) -> float:
    """Its bytes, wherever it is."""
    return math.prod(self.shape) * _BITS[self.dtype] / 8

  @property
  def in_memory(self) -> float:
    """Its bytes in the device's main memory: other memory spaces are on the chip."""
    return 0.0 if re.search(r'S\([1-9]', self.layout) else self.bytes


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """One line of the program's text."""
  name: str
  is_root: bool
  result: tuple[_Array, ...]
  opcode: str
  operands: tuple[str, ...]
  text: str  # of the operands
  attributes: str

  def attribute(self, name: str) -> str | None:
    """The computation that an attribute names."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.attributes)
    return found and found[1]


_Computation = dict[str, _Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of a kind, per device: how many run, and the bytes that they carry."""
  kind: str
  count: int
  bytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
  """The costs of a program, per device and call.

  Attributes:
    flops: by the precision of the products: 'bfloat16' (or another narrow type), 'float64', and
      for those of float32 'default', 'high', 'highest', or 'three' (of bfloat16 parts).
    bytes: read from and written to the device's memory.
    collectives: one for each kind that occurs.
  """
  flops: dict[str, float]
  bytes: float
  collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What one kernel of a program does, all its runs together.

  Attributes:
    source: the path of operations in the Python code that it comes from, as JAX names them.
    opcode: of the instruction, with what it calls: 'fusion', 'custom-call __cudnn$conv', ...
    times: how often it runs.
    flops: by precision, see `Costs`.
    bytes: through memory.
    cycles: the compiler's own estimate, or None; TPUs only.
    largest: bytes of the largest array that it writes to memory.
  """
  source: str
  opcode: str
  times: int
  flops: dict[str, float]
  bytes: float
  cycles: int | None
  largest: float


def costs(text: str) -> Costs:
  """Counts what a compiled program does.

  Args:
    text: the optimized HLO.
  """
  computations, entry = _parse(text)
  flops: dict[str, float] = {}
  moved, carried = 0.0, {kind: [0, 0.0] for kind in COLLECTIVES}
  for scope, instruction, times in _kernels(computations, entry, 1):
    for precision, count in _flops(computations, scope, instruction):
      flops[precision] = flops.get(precision, 0) + count * times
    moved += _moved(computations, scope, instruction) * times
    for kind, size in _carried(computations, scope, instruction):
      carried[kind][0] += times
      carried[kind][1] += size * times
  found = tuple(Collective(kind, int(count), size) for kind, (count, size) in carried.items()
                if count)
  return Costs(flops, moved, found)


def kernels(text: str) -> list[Kernel]:
  """The kernels of a compiled program, in the order of its text.

  Args:
    text: the optimized HLO.
  """
  computations, entry = _parse(text)
  found = []
  for scope, instruction, times in _kernels(computations, entry, 1):
    flops: dict[str, float] = {}
    for precision, count in _flops(computations, scope, instruction):
      flops[precision] = flops.get(precision, 0) + count * times
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    found.append(Kernel(
        source[1] if source else '', instruction.opcode + (f' {target[1]}' if target else ''),
        times, flops, _moved(computations, scope, instruction) * times,
        int(cycles[1]) * times if cycles else None,
        max((array.in_memory for array in instruction.result), default=0.0)))
  return found


def _parse(text) -> tuple[dict[str, _Computation], str]:
  """({name: computation}, the name of the one where the program starts)."""
  computations: dict[str, _Computation] = {}
  current, entry = None, ''
  for line in text.splitlines():
    if line[:1] in ('%', 'E') and '->' in line and line.rstrip().endswith('{'):
      name = line.removeprefix('ENTRY ').lstrip('%').split(' ')[0].split('(')[0]
      current = computations.setdefault(name, {})
      if line.startswith('ENTRY'):
        entry = name
    elif current is not None and (found := _LINE.match(re.sub(r'/\*.*?\*/', '', line))):
      if instruction := _instruction(*found.groups()):
        current[instruction.name] = instruction
  return computations, entry


def _instruction(root, name, rest):
  """An instruction, from 'f32[8]{0} add(%a, %b), metadata=...'."""
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  result, rest = rest[:end], rest[end:].lstrip()
  opcode = re.match(r'([\w\-]+)\(', rest)
  if not opcode:
    return None
  end = _closing(rest, opcode.end() - 1)
  operands = rest[opcode.end():end]
  return _Instruction(name, bool(root), _arrays(result), opcode[1],
                      tuple(re.findall(r'%([\w.\-]+)', operands)), operands, rest[end + 1:])


def _closing(text, start):
  """The position of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if not depth:
      return i
  return len(text)


def _arrays(text):
  return tuple(_Array(dtype, tuple(int(n.removeprefix('<=')) for n in shape.split(',') if n),
                      layout or '')
               for dtype, shape, layout in _ARRAY.findall(text) if dtype in _BITS)


def _kernels(computations, name, times) -> Iterator[tuple[_Computation, _Instruction, int]]:
  """Every instruction that runs as a kernel, with its computation and how often it runs."""
  for instruction in computations[name].values():
    if instruction.opcode == 'while':
      trips = _trips(computations, computations[name], instruction)
      yield from _kernels(computations, instruction.attribute('body'), times * trips)
    elif instruction.opcode == 'conditional':  # the branch that costs most
      branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
      names = (re.findall(r'%?([\w.\-]+)', branches[1]) if branches else
               [instruction.attribute(f'{value}_computation') for value in ('true', 'false')])
      weight = lambda kernels: sum(_moved(computations, scope, kernel) * n
                                   for scope, kernel, n in kernels)
      yield from max((list(_kernels(computations, branch, times)) for branch in names), key=weight)
    elif instruction.opcode == 'call' and instruction.attribute('to_apply') in computations:
      yield from _kernels(computations, instruction.attribute('to_apply'), times)
    elif instruction.opcode not in _FREE:
      yield computations[name], instruction, times


def _trips(computations, scope, loop) -> int:
  """How often a loop runs; 1 if that is not known."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = computations[loop.attribute('condition')]
  compare = next(inner for inner in condition.values() if inner.is_root)
  if compare.opcode != 'compare' or 'direction=LT' not in compare.attributes:
    return 1
  start = scope.get(loop.operands[0])
  carried = start.operands if start is not None and start.opcode == 'tuple' else ()

  def initially(name):
    """The integer that a value of the condition is before the first iteration, or None."""
    value, where = condition[name], condition
    if value.opcode == 'get-tuple-element':
      position = int(re.findall(r'index=(\d+)', value.attributes)[0])
      value, where = scope.get(carried[position]) if position < len(carried) else None, scope
    while value is not None and value.opcode in ('copy', 'bitcast') and value.operands:
      value = where.get(value.operands[0])
    if value is None or value.opcode != 'constant' or not re.fullmatch(r'-?\d+', value.text):
      return None
    return int(value.text)

  first, end = map(initially, compare.operands)
  return max(1, end - (first or 0)) if end is not None else 1


def _inside(computations, scope, instruction):
  """The instructions of a kernel, with their computations: itself, or those of its fusion."""
  called = computations.get(instruction.attribute('calls'))
  if called is None:
    yield scope, instruction
    return
  for inner in called.values():
    yield from _inside(computations, called, inner)


def _flops(computations, scope, instruction):
  """Yields (precision, FLOPs) of the products in a kernel."""
  for inner_scope, inner in _inside(computations, scope, instruction):
    shapes = [inner_scope[name].result[0].shape if inner_scope[name].result else ()
              for name in inner.operands if name in inner_scope]
    if inner.opcode == 'convolution' or '__cudnn$conv' in inner.attributes:
      yield _precision(inner_scope, inner), _convolution_flops(inner, shapes)
    elif inner.opcode == 'dot' or '__cublas' in inner.attributes:
      yield _precision(inner_scope, inner), _dot_flops(inner, shapes)
    elif '__cudnn$fmha' in inner.attributes:
      yield _precision(inner_scope, inner), _attention_flops(shapes)
    elif estimate := re.search(r'"cost_estimate":\{"flops":"(\d+)"', inner.attributes):
      yield 'bfloat16', float(estimate[1])  # of a Pallas kernel, in products of bfloat16


def _precision(scope, product):
  dtype = next((scope[name].result[0].dtype for name in product.operands
                if name in scope and scope[name].result), 'f32')
  if dtype != 'f32':
    return 'float64' if dtype == 'f64' else 'bfloat16'
  if 'algorithm=dot_bf16_bf16_f32_x3' in product.attributes:
    return 'three'
  found = re.search(r'operand_precision=\{(\w+)', product.attributes, re.IGNORECASE) or re.search(
      r'"operand_precision":\["(\w+)"', product.attributes)
  return found[1].lower() if found else 'default'


def _dot_flops(product, shapes):
  contracted = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([\d,"]*)',
                         product.attributes)
  if not (contracted and shapes and product.result):
    return 0.0
  depth = math.prod(shapes[0][int(n)] for n in contracted[1].replace('"', '').split(',') if n)
  return 2.0 * math.prod(product.result[0].shape) * depth


def _attention_flops(shapes):
  """Of scores and weighted values: queries [parts, B, heads, D], keys [parts, n, heads, D]."""
  queries, keys = shapes[:2]
  return 4.0 * math.prod(queries) * math.prod(keys) / (keys[0] * keys[2] * keys[3])


def _convolution_flops(product, shapes):
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', product.attributes)
  if not labels or len(shapes) < 2:
    return 0.0
  kernel, output = labels[2], labels[3]
  results = [array.shape for array in product.result if len(array.shape) == len(output)]
  if 'BackwardFilter' in product.attributes:  # cuDNN names the gradient of the output as kernel
    gradient = math.prod(n for label, n in zip(output, shapes[1]) if label != 'f')
    return 2.0 * gradient * math.prod(results[0])
  taps = math.prod(n for label, n in zip(kernel, shapes[1]) if label != 'o')
  if 'BackwardInput' in product.attributes:  # the first operand is the gradient of the output
    return 2.0 * math.prod(shapes[0]) * taps
  # A dilated input is mostly zeros, which cost nothing if the compiler splits the convolution.
  dilation = re.search(r'lhs_dilate=([\dx]+)', product.attributes)
  zeros = math.prod(int(n) for n in dilation[1].split('x')) if dilation else 1
  return 2.0 * math.prod(results[0]) * taps / zeros


def _moved(computations, scope, instruction):
  """Bytes that a kernel reads from memory and writes to it."""
  opcode = instruction.opcode
  if stated := re.search(r'"cost_estimate":\{.*?"bytes_accessed":"(\d+)"', instruction.attributes):
    return float(stated[1])  # of a Pallas kernel, which may read its operands several times
  if opcode in ('copy-start', 'slice-start', 'dynamic-slice-start'):  # between memory spaces
    # (target, source, context), or ((source, positions...), target, context)
    source, target = (instruction.result[1::-1] if opcode == 'copy-start' else
                      (instruction.result[0], instruction.result[len(instruction.operands)]))
    moved = min(source.bytes, target.bytes)
    return moved * ((source.in_memory > 0) + (target.in_memory > 0))
  reads = 0.0
  for position, name in enumerate(instruction.operands):
    if name not in scope or (opcode == 'custom-call' and name in instruction.operands[:position]):
      continue  # keys and values of an attention are read together
    full = sum(array.in_memory for array in scope[name].result)
    called = computations.get(instruction.attribute('calls'))
    if called is not None:
      reads += _read_of(computations, called, position, full)
    elif position == 0 and opcode in ('dynamic-slice', 'slice', 'gather'):
      reads += min(full, sum(array.bytes for array in instruction.result))
    elif not (position == 0 and opcode in ('dynamic-update-slice', 'scatter')):
      reads += full
  return reads + _written(computations, instruction, scope)


def _read_of(computations, called, position, full):
  """Bytes of a fusion's operand that it reads: a slice or a gather reads a part."""
  names = [inner.name for inner in called.values()
           if inner.opcode == 'parameter' and inner.text.strip() == str(position)]
  total = 0.0
  while names:
    name = names.pop()
    for user in (inner for inner in called.values() if name in inner.operands):
      first = user.operands[0] == name
      if user.opcode == 'bitcast':
        names.append(user.name)
      elif first and user.opcode in ('dynamic-slice', 'slice', 'gather'):
        total += sum(array.bytes for array in user.result)
      elif user.opcode == 'fusion' and user.attribute('calls') in computations:
        total += sum(_read_of(computations, computations[user.attribute('calls')], i, full)
                     for i, operand in enumerate(user.operands) if operand == name)
      elif not (first and user.opcode in ('dynamic-update-slice', 'scatter')):
        return full
  return min(total, full)


def _written(computations, instruction, scope):
  """Bytes that a kernel writes: an update in place writes only what it changes."""
  called = computations.get(instruction.attribute('calls'))
  roots = [] if called is None else [inner for inner in called.values() if inner.is_root]
  if called is not None and roots and roots[0].opcode == 'tuple':
    parts = [(called, called.get(name)) for name in roots[0].operands]
  else:
    parts = [(called, roots[0])] if roots else [(scope, instruction)]
  total = 0.0
  for position, (where, part) in enumerate(parts):
    while part is not None and part.opcode == 'bitcast' and part.operands[0] in where:
      part = where[part.operands[0]]
    results = instruction.result if len(parts) == 1 else instruction.result[position:position + 1]
    if part is not None and part.opcode in ('dynamic-update-slice', 'scatter'):
      update = where.get(part.operands[1 if part.opcode == 'dynamic-update-slice' else -1])
      total += 0.0 if update is None else sum(array.bytes for array in update.result)
    else:
      total += sum(array.in_memory for array in _new(instruction, results, scope))
  return total


def _new(instruction, results, scope):
  """Those of the results that a kernel writes: not its operands, nor the scratch of a library."""
  if '__cu' in instruction.attributes and instruction.opcode == 'custom-call':
    return results[:1]
  if instruction.opcode in ('all-gather-start', 'collective-permute-start'):
    return results[sum(len(scope[name].result) for name in instruction.operands if name in scope):]
  return results


def _carried(computations, scope, instruction):
  """Yields (kind, bytes) of the collectives of a kernel, the larger of in and out for each."""
  for inner_scope, inner in _inside(computations, scope, instruction):
    kind = inner.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      given = sum(array.bytes for name in inner.operands if name in inner_scope
                  for array in inner_scope[name].result)
      made = sum(array.bytes for array in inner.result)
      if inner.opcode != kind and kind != 'all-reduce':  # a start repeats its operands
        made -= given
      yield kind, max(given, made)
