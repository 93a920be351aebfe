"""The programs of a run, compiled for machines that are not here.

    init          the initial state
    step          the training step
    embed         the encoder in evaluation, on one chunk of images
    rows          writing a chunk's embeddings into a bank of fresh features
    knn           the search of neighbors for kNN accuracy
    check         the check that all values are finite, before a checkpoint
    checkpoint    the copy of the state that is written while training goes on
    digest        the bank's digest at the end, piece by piece
    restore       nothing: every device reads its rows from the checkpoint

With `--program=evaluate`, those of the protocols for any number of images, with 1,000 classes:

    features      the encoder in evaluation, with the pooled features, on one chunk of images
    neighbors     the search of 200 neighbors by pooled features, in one block of the images
    linear_online the step that trains linear classifiers on every stage
    few_label     the step of fine-tuning

They are the functions that the run itself calls, with arguments that have shapes but no values.
"""

from collections.abc import Callable
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box as rich_box
from rich import console as rich_console
from rich import table as rich_table

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import feeds, views
from instdisc_jax.evaluation import (
  embedding,
  evaluator,
  few_label,
  knn,
  linear_online,
  nearest,
  supervised,
)
from instdisc_jax.runtime import checkpoint, digest, hardware, hlo
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import monitor
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib

NAMES = ('init', 'step', 'embed', 'rows', 'knn', 'check', 'checkpoint', 'digest', 'restore')
EVALUATION = ('features', 'neighbors', 'linear_online', 'few_label')
QUERIES = 50_000
CLASSES = 1_000
_WIDTH = 200  # of the table, in characters: cut columns would say nothing


@dataclasses.dataclass(frozen=True)
class Report:
  """One program, compiled.

  Attributes:
    program: its name.
    compile_seconds: 0 if there was nothing to compile.
    costs: see `hlo.Costs`; None if it was not compiled.
    memory: bytes on a device: 'arguments', 'outputs', 'aliased' (outputs in the place of
      arguments), 'temporary', their 'total', and 'beside' (the rest of the run's state).
    roofline_seconds: the larger of FLOPs over peak and bytes over bandwidth; None if unknown.
    bound_by: 'compute' or 'memory', or None.
  """
  program: str
  compile_seconds: float = 0.0
  costs: hlo.Costs | None = None
  memory: dict[str, float] = dataclasses.field(default_factory=dict)
  roofline_seconds: float | None = None
  bound_by: str | None = None

  @property
  def needed(self) -> float:
    """Bytes that a device needs while it runs."""
    return self.memory.get('total', 0) + self.memory.get('beside', 0)


class Run:
  """A run on a machine that is not here.

  Args:
    config: a `ConfigDict` with the keys of `config.default()`.
    devices: the devices of the machine.
    chip: what each of them is.
    queries: number of queries of the kNN search.

  Attributes:
    setup: the fixed parts of the run.
    chip: see above.

  Raises:
    errors.UserError: a setting is invalid, or the data are missing or do not fit.
  """

  def __init__(self, config: config_lib.Config, devices: list[Any], chip: hardware.Chip,
               queries: int = QUERIES):
    config_lib.validate(config)
    num_rows, self._image_shape = data.describe(config.dataset, config.seed)
    mesh = mesh_lib.make(devices)
    config = config_lib.fill(config, num_rows, mesh_lib.on_cpu(mesh))
    if config.dataset.path == 'auto':
      config.dataset.path = feeds.choose_path(config, num_rows, self._image_shape, chip.memory)
    self.setup = state_lib.Setup.for_data(config, num_rows, self._image_shape, mesh)
    self.chip = chip
    size = views.size(config, self._image_shape)
    self._size, self._queries = size, queries
    whole = None if config.dataset.path == 'stream' else self._image_shape
    self._embedded = size if whole is None else whole[:2]
    init = state_lib.make_init(self.setup, size)
    self._state = _with_shardings(jax.eval_shape(init), mesh)
    self._feed, self._batches = feeds.like(config, num_rows, self._image_shape, mesh)
    # {name: () -> (a jitted function, its arguments)}
    self._make: dict[str, Callable[[], tuple[Any, tuple]]] = {
        'init': lambda: (init, ()),
        'step': lambda: (step_lib.over_mesh(self.setup, self._feed),
                         (self._state, self._batches, self._scalar())),
        'embed': self._embed,
        'rows': lambda: (embedding.write_rows(mesh), (
            self._rows(jnp.float32), self._rows(jnp.float32, self._per_device() * mesh.size),
            self._scalar(), self._scalar())),
        'knn': self._knn,
        'check': lambda: (monitor.first_bad_rows(mesh), (self._state,)),
        'checkpoint': lambda: (checkpoint.copy, (self._state,)),
        'digest': lambda: (
            digest.piece(mesh, digest.piece_size(self._state.bank, mesh)),
            (self._state.bank, self._scalar())),
        'features': lambda: self._embed((embedding.EMBEDDING, 'pooled')),
        'neighbors': self._neighbors,
        'linear_online': self._linear_online,
        'few_label': self._few_label,
    }

  def lower(self, name: str) -> jax.stages.Lowered:
    """One of `NAMES` but 'restore', or of `EVALUATION`, lowered for the machine."""
    function, arguments = self._make[name]()
    return function.lower(*arguments)

  def compile(self, name: str) -> Report:
    """Compiles one of `NAMES` or `EVALUATION`; nothing if its arguments alone do not fit."""
    if name not in self._make:
      state = _bytes(self._state)
      return Report(name, memory={'arguments': 0.0, 'outputs': state, 'aliased': 0.0,
                                  'temporary': 0.0, 'total': state, 'beside': state})
    start = time.monotonic()
    function, arguments = self._make[name]()
    held = self._state, self._batches[0]
    beside = 0.0 if name in EVALUATION else _bytes(held) - _bytes(arguments, among=held)
    if name in ('embed', 'knn'):  # at the end of the run, the fresh features of all images
      beside += _bytes(self._rows(jnp.float32))
    given = _bytes(arguments)
    if given > self.chip.memory:
      return self._refused(name, given, given, beside)
    try:
      compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      return self._refused(name, given, max(given, _needed(str(e)) or given), beside)
    seconds, costs = time.monotonic() - start, hlo.costs(compiled.as_text())
    found: Any = compiled.memory_analysis()
    memory = {'arguments': found.argument_size_in_bytes, 'outputs': found.output_size_in_bytes,
              'aliased': found.alias_size_in_bytes, 'temporary': found.temp_size_in_bytes}
    memory |= {'total': (memory['arguments'] + memory['outputs'] - memory['aliased']
                         + memory['temporary']), 'beside': beside}
    return Report(name, seconds, costs, memory, *_roofline(costs, self.chip))

  def verdict(self, reports: list[Report]) -> tuple[bool, str]:
    """(whether all programs fit, one line that says so, or what would make them fit)."""
    capacity, gib = self.chip.memory, 2**30
    worst = max(reports, key=lambda report: report.needed)
    needed = f'{worst.needed / gib:,.2f} of {capacity / gib:,.2f} GiB per device'
    if worst.needed <= capacity:
      return True, f'fits: the largest program, {worst.program}, needs {needed}'
    return False, (f'does not fit: {worst.program} needs {needed}, '
                   f'{(worst.needed - capacity) / gib:,.2f} GiB too much: {self._advice(reports)}')

  def _advice(self, reports):
    """The setting that would make all programs fit, by estimate."""
    capacity, config, devices = self.chip.memory, self.setup.config, self.setup.mesh.size
    bank, copies = self._state.bank, lambda report: 2 if report.program == 'checkpoint' else 1
    fit = lambda needed: all(needed(report) <= capacity for report in reports)
    if bank.dtype.itemsize > 2 and self.chip.kind != 'cpu':  # XLA:CPU would widen it
      saved = (1 - 2 / bank.dtype.itemsize) * _bytes(bank)
      if fit(lambda report: report.needed - saved * copies(report)):
        narrow = 'float16' if self.chip.kind.startswith('NVIDIA') else 'bfloat16'
        return f'set --config.bank.dtype={narrow}'
    for parts in (2, 4, 8, 16):
      spared = lambda report: (report.memory.get('temporary', 0) * (1 - 1 / parts)
                               if report.program == 'step' else 0)
      if config.batch_size % (devices * config.accumulate_steps * parts) == 0 and fit(
          lambda report: report.needed - spared(report)):
        return f'set --config.accumulate_steps={config.accumulate_steps * parts}'
    everywhere = _bytes(self._state.replace(bank=(), classifier=()))
    everywhere += 0 if config.dataset.path == 'stream' else _bytes(self._batches[0])
    for more in (devices * 2**i for i in range(1, 16)):
      kept = lambda report: min(everywhere * copies(report), report.needed)
      if fit(lambda report: kept(report) + (report.needed - kept(report)) * devices / more):
        return f'choose a --topology with at least {more} devices'
    return 'set --config.model.name or --config.model.width to a smaller encoder'

  def _embed(self, names=(embedding.EMBEDDING,)):
    config, mesh = self.setup.config, self.setup.mesh
    images = jax.ShapeDtypeStruct((self._per_device() * mesh.size, *self._embedded, 3), jnp.uint8,
                                  sharding=NamedSharding(mesh, P(mesh_lib.AXIS)))
    return embedding.encode(config, self.setup.encoder, mesh, self._size, names), (
        self._variables(), images)

  def _variables(self):
    return {'params': self._state.params, 'batch_stats': self._state.batch_stats}

  def _widths(self, names):
    """{name: F} of the encoder's features."""
    function, arguments = self._embed(names)
    return {name: x.shape[1] for name, x in jax.eval_shape(function, *arguments).items()}

  def _neighbors(self):
    mesh, num_rows = self.setup.mesh, self.setup.num_rows
    width, = self._widths(('pooled',)).values()
    size = nearest.block_size(num_rows, width, mesh.size, nearest.SHARE * self.chip.memory)
    rows = jax.ShapeDtypeStruct((mesh_lib.padded(size, mesh.size), width), jnp.float32,
                                sharding=NamedSharding(mesh, P(mesh_lib.AXIS)))
    queries = jax.ShapeDtypeStruct((nearest.queries_at_once(self._queries, width), width),
                                   jnp.float32, sharding=NamedSharding(mesh, P()))
    return knn.over_mesh(mesh, min(200, size), size), (queries, rows, None)

  def _linear_online(self):
    probe = linear_online.Probe(self.setup.config, self.setup.encoder, self.setup.mesh, CLASSES)
    widths = self._widths(linear_online.ALL)
    config = probe.configure(self.setup.config.dataset.path, 0, self._size)
    feed, inputs = self._labeled(config)
    return probe.step(config, feed, widths), (
        probe.shapes(widths), self._variables(), inputs, self._labels(), self._scalar())

  def _few_label(self):
    tuner = few_label.Tuner(self.setup.config, self.setup.encoder, self.setup.mesh, self._size,
                            CLASSES)
    config = supervised.configure(
        self.setup.config, self.setup.config.dataset.path, 0,
        tuner.recipe.batch(self.setup.num_rows, self.setup.mesh.size), self._size)
    feed, inputs = self._labeled(config)
    return tuner.step(config, feed), (tuner.like(self._variables()), inputs, self._labels(),
                                      self._scalar(jnp.uint32), self._scalar())

  def _labeled(self, config):
    """(class of the feed, inputs) of training with labels."""
    return feeds.like(config, self.setup.num_rows, self._image_shape, self.setup.mesh)

  def _labels(self):
    return jax.ShapeDtypeStruct((self.setup.num_rows,), jnp.int32,
                                sharding=NamedSharding(self.setup.mesh, P()))

  def _per_device(self):
    """Images per device in a chunk of the embedding."""
    return embedding.per_device(self._embedded, self._state.bank.shape[0] // self.setup.mesh.size)

  def _knn(self):
    config, mesh, num_rows = self.setup.config, self.setup.mesh, self.setup.num_rows
    queries = min(self._queries, num_rows)
    replicated = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, P()))
    search = knn.over_mesh(mesh, evaluator.num_searched(config, num_rows), num_rows,
                           config.knn.recall_target)
    return search, (replicated((queries, config.model.embedding_dim), jnp.float32),
                    self._state.bank, replicated((queries,), jnp.int32))

  def _rows(self, dtype, count=None):
    """`count` embeddings, or a bank of them, sharded."""
    shape = count or self._state.bank.shape[0], self.setup.config.model.embedding_dim
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self._state.bank.sharding)

  def _scalar(self, dtype=jnp.int32):
    return jax.ShapeDtypeStruct((), dtype, sharding=NamedSharding(self.setup.mesh, P()))

  def _refused(self, name, given, needed, beside):
    return Report(name, memory={'arguments': given, 'outputs': 0.0, 'aliased': 0.0,
                                'temporary': needed - given, 'total': needed, 'beside': beside})


def show(run: Run, reports: list[Report]) -> None:
  """Prints a table, a line a program."""
  config, capacity = run.setup.config, run.chip.memory
  table = rich_table.Table(
      box=rich_box.SIMPLE, title_justify='left', padding=(0, 1, 0, 0),
      title=f'{config.model.name}, {config.loss.name}, N = {run.setup.num_rows:,}, '
            f'B = {config.batch_size:,}, {run.setup.mesh.size} devices; per device, in MB and ms')
  for name in ('program', 'compiled in', 'GFLOP', 'moved', 'arguments', 'outputs', 'temporary',
               f'needed (of {capacity / 1e6:,.0f})', 'roofline', 'bound by', 'collectives'):
    table.add_column(name, no_wrap=True,
                     justify='left' if name in ('program', 'collectives') else 'right')
  for report in reports:
    memory = [f'{report.memory[key] / 1e6:,.1f}' for key in ('arguments', 'outputs', 'temporary')]
    memory.append(f'{report.needed / 1e6:,.1f}')
    if report.costs is None:
      table.add_row(report.program, *'–––', *memory, *'–––')
      continue
    carried = ', '.join(f'{found.count} {found.kind} {found.bytes / 1e6:,.2f}'
                        for found in report.costs.collectives)
    seconds = report.roofline_seconds
    table.add_row(report.program, f'{report.compile_seconds:.1f} s',
                  f'{sum(report.costs.flops.values()) / 1e9:,.1f}',
                  f'{report.costs.bytes / 1e6:,.1f}', *memory,
                  '–' if seconds is None else f'{seconds * 1e3:,.3f}', report.bound_by or '–',
                  carried or 'none')
  rich_console.Console(width=_WIDTH).print(table)


def to_json(run: Run, reports: list[Report], topology: str) -> dict[str, Any]:
  """Everything that was found, as JSON can represent it."""
  fits, line = run.verdict(reports)
  return {
      'num_rows': run.setup.num_rows, 'batch_size': run.setup.config.batch_size, 'fits': fits,
      'verdict': line, 'jax': jax.__version__,
      'settings': config_lib.to_json(run.setup.config),
      'programs': [{
          'program': report.program, 'topology': topology, 'num_devices': run.setup.mesh.size,
          'compile_seconds': report.compile_seconds,
          'flops': None if report.costs is None else sum(report.costs.flops.values()),
          'bytes_accessed': None if report.costs is None else report.costs.bytes,
          'memory': report.memory | {'capacity': run.chip.memory},
          'collectives': [] if report.costs is None else [
              dataclasses.asdict(collective) for collective in report.costs.collectives],
          'roofline_seconds': report.roofline_seconds, 'bound_by': report.bound_by,
      } for report in reports]}


def _with_shardings(state, mesh):
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.tree.map(place, state, state_lib.shardings(mesh, state))


def _bytes(tree: Any, among: Any = None) -> float:
  """Bytes on a device of the arrays of a tree, or of those that another one holds, too."""
  kept = None if among is None else {id(x) for x in jax.tree.leaves(among)}
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                   for x in jax.tree.leaves(tree) if kept is None or id(x) in kept))


def _needed(message):
  """The bytes that a compiler says are needed."""
  found = (re.search(r'Used ([\d.]+)([KMGT]?) of', message)
           or re.search(r'\(([\d.]+)([KMGT]?)\) exceeds available', message))
  return found and float(found[1]) * 2 ** {'': 0, 'K': 10, 'M': 20, 'G': 30, 'T': 40}[found[2]]


def _roofline(costs, chip):
  """(seconds, what bounds them)."""
  if chip.flops is None or chip.bandwidth is None:
    return None, None
  products = sum(count * chip.products(precision) for precision, count in costs.flops.items())
  compute, memory = products / chip.flops, costs.bytes / chip.bandwidth
  return max(compute, memory), 'compute' if compute > memory else 'memory'
