"""Monitoring of a run: its metrics are checked and logged.

The metrics of a dispatch are fetched one dispatch later, so the devices never wait for the host.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax.runtime import errors, metrics, profiling
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import optimizer
from instdisc_jax.training.plan import Plan
from instdisc_jax.training.state import SPECS, Setup, TrainState

_NONE = 2**31 - 1  # instead of a row
_DAY, _WORTH_A_GPU = 24 * 3600.0, 600.0  # seconds left
_COLLAPSED = 0.99  # norm of the mean embedding above which an encoder counts as collapsed


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """Steps that were dispatched to the devices together.

  Attributes:
    step: steps taken once they are done.
    count: number of steps.
    history: {metric: [S]}, of which the first `count` values are filled.
    asked: what was asked for before the dispatch; see `preemption.Watch.poll`.
  """
  step: int
  count: int
  history: dict[str, Any]
  asked: Any


class Monitor:
  """Checks and logs the metrics of a run.

  Args:
    setup: the fixed parts of the run.
    plan: the schedule of log lines.
    lines: the writer of metrics.jsonl.
    progress: the terminal output.
    pending_losses: losses since the last line, from before the run was resumed.
    wall_clock: () -> seconds since the run began.
    last_saved: () -> the step of the newest checkpoint, or None.

  Attributes:
    losses: losses of the steps since the last line.
    final_loss: loss of the last step, over the global batch; None if no step was taken.
    timer: measures images per second.
  """

  def __init__(self, setup: Setup, plan: Plan, *, lines: metrics.Metrics,
               progress: metrics.Progress, pending_losses: Sequence[float],
               wall_clock: Callable[[], float], last_saved: Callable[[], int | None]):
    self.losses, self.final_loss, self.timer = list(pending_losses), None, Timer()
    self._batch_size, self._plan = setup.config.batch_size, plan
    self._schedule = optimizer.learning_rate_schedule(setup.config, setup.num_rows)
    self._lines, self._progress = lines, progress
    self._wall_clock, self._last_saved = wall_clock, last_saved
    self._costs: profiling.Costs | None = None
    self._on_cpu = mesh_lib.on_cpu(setup.mesh)
    self._collapsed = False
    # An untrained encoder's embeddings are nearly identical, too: a warning waits until they part.
    self._parted = min(plan.end // 2, max(100, plan.end // 20))

  def compiled(self, costs: profiling.Costs) -> None:
    """Reports the cost of the step."""
    self._costs = costs
    self._progress.print(f'the step: {costs}')

  def settle(self, dispatch: Dispatch) -> int:
    """Waits for a dispatch, then checks and logs its metrics.

    Returns:
      What was asked for before the dispatch; see `preemption.Watch.poll`.

    Raises:
      errors.RunError: one of the metrics is not finite.
    """
    history = {name: np.asarray(value)[:dispatch.count] for name, value in dispatch.history.items()}
    first = dispatch.step - dispatch.count
    for name in ('feature_mean_norm', 'loss', 'grad_norm'):
      bad = np.flatnonzero(~np.isfinite(history[name]))
      if bad.size:
        raise errors.RunError(_not_finite(name, history[name][bad[0]], first + bad[0],
                                          self._last_saved()))
    self.timer.count(dispatch.count * self._batch_size)
    self.losses.extend(history['loss'].tolist())
    self.final_loss = float(history['loss'][-1])
    rate = self.timer.rate()
    self._progress.advance(dispatch.step, self._plan.epoch(dispatch.step), self.final_loss, rate)
    if self._costs is not None and rate is not None:
      left = (self._plan.end - dispatch.step) * self._batch_size / rate
      parts = [self._costs.utilization(rate / self._batch_size),
               f'{metrics.duration(left)} left for {self._plan.end - dispatch.step:,} steps']
      self._progress.print(f'the first steps: {", ".join(filter(None, parts))}')
      if left > _WORTH_A_GPU and self._on_cpu and (
          there := self._costs.on_a_gpu(self._plan.end - dispatch.step)):
        self._progress.print(there)
      if left > _DAY and self._on_cpu:
        self._progress.print('that is long for a CPU: use a GPU, or set --config.minutes, or a '
                             'smaller --config.augment.size or --config.model.width')
      self._costs = None  # reported once
    if self._plan.logs(dispatch.step):
      self._log(dispatch.step, {name: float(value[-1]) for name, value in history.items()})
    return int(dispatch.asked)

  def evaluated(self, step: int, measured: dict[str, float]) -> None:
    """Logs what was measured after `step` steps, and shows kNN accuracy if that is known."""
    epoch = self._plan.epoch(step)
    text = f'epoch {epoch:4d}  step {step:6d}'
    if self.final_loss is not None:
      text += f'  loss {self.final_loss:.4f}'
    self._lines.write(step, epoch=epoch, **measured)
    if 'knn_top1' in measured:
      text += f'  kNN top-1 {measured["knn_top1"]:.4f}'
    self._progress.print(text)

  def has_evaluated(self, step: int) -> bool:
    """Whether the evaluation after `step` steps was logged before the run was resumed."""
    return step in self._lines.evaluated

  def _log(self, step, line):
    """Writes a line, and warns when the encoder collapses."""
    epoch = self._plan.epoch(step)
    line |= dict(epoch=epoch, loss=float(np.mean(self.losses)), step_loss=self.final_loss,
                 learning_rate=float(np.asarray(self._schedule(step - 1))),
                 images_per_second=self.timer.rate(), input_wait=self.timer.waiting_share(),
                 wall_seconds=self._wall_clock())
    self.losses.clear()
    self._lines.write(step, **line)
    before, self._collapsed = self._collapsed, (
        line['feature_mean_norm'] > _COLLAPSED and step >= self._parted)
    if self._collapsed and not before:
      errors.warn(
          f'the embeddings of step {step} are nearly identical: the norm of their mean is '
          f'{line["feature_mean_norm"]:.4f}, well below 1 for a working encoder: try a smaller '
          '--config.optimizer.learning_rate or --config.loss.temperature')


class Timer:
  """Images per second, and the share of time spent waiting for input; pauses are excluded."""

  def __init__(self):
    self._mark: float | None = None
    self._images = 0
    self._seconds = self._waited = 0.0
    self._recent: float | None = None
    self._since_line = [0.0, 0.0]  # seconds waited, seconds

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Context manager for code that waits for the input."""
    start = time.monotonic()
    yield
    if self._mark is not None:
      self._waited += time.monotonic() - start

  def count(self, images: int) -> None:
    """Records that `images` more have been trained on."""
    now = time.monotonic()
    if self._mark is not None:
      seconds = now - self._mark
      self._recent = images / seconds
      self._images += images
      self._seconds += seconds
      self._since_line[0] += self._waited
      self._since_line[1] += seconds
    self._mark, self._waited = now, 0

  def restart(self) -> None:
    """Excludes the time since the last `count`."""
    if self._mark is not None:
      self._mark, self._waited = time.monotonic(), 0

  def rate(self) -> float | None:
    """Recent images per second; None before the first measurement."""
    return self.mean() if self._recent is None else self._recent

  def mean(self) -> float | None:
    """Mean images per second of the full run; None before the first measurement."""
    return self._images / self._seconds if self._seconds else None

  def waiting_share(self) -> float | None:
    """Share of the time since the last call that was spent waiting; None if no time was counted."""
    (waited, seconds), self._since_line = self._since_line, [0.0, 0.0]
    return waited / seconds if seconds else None


def check_finite(state: TrainState, mesh: jax.sharding.Mesh, saved: int | None) -> None:
  """Raises `errors.RunError` if any value of the state is not finite, including the bank's rows.

  Args:
    state: the state.
    mesh: the device mesh.
    saved: the step of the newest checkpoint, or None.
  """
  for name, row in jax.device_get(first_bad_rows(mesh)(state)).items():
    if row < _NONE:
      which = f'bank row {row}' if name == 'bank' else name
      raise errors.RunError(_not_finite(which, 'NaN or infinite', int(state.step), saved))


@functools.cache
def first_bad_rows(mesh: jax.sharding.Mesh) -> Any:
  """A jitted state -> {field: the first row of its arrays with a non-finite value, or 2^31 - 1}."""
  def first(x, spec):
    bad = ~jnp.isfinite(x).reshape(x.shape[0] if x.ndim else 1, -1).all(axis=1)
    row = jnp.argmax(bad).astype(jnp.int32)
    if spec != P():
      row += lax.axis_index(mesh_lib.AXIS) * x.shape[0]
    row = jnp.where(bad.any(), row, _NONE)
    return row if spec == P() else lax.pmin(row, mesh_lib.AXIS)

  def device_part(state):
    found = {}
    for name, part in vars(state).items():
      arrays = [x for x in jax.tree.leaves(part) if jnp.issubdtype(x.dtype, jnp.inexact)]
      if arrays:
        found[name] = jnp.stack([first(x, getattr(SPECS, name)) for x in arrays]).min()
    return found

  return jax.jit(jax.shard_map(device_part, mesh=mesh, in_specs=(SPECS,), out_specs=P()))


def _not_finite(name, value, step, saved):
  kept = 'no checkpoint was written' if saved is None else f'the checkpoint of step {saved} is kept'
  return (f'{name} is {value} at step {step}, must be finite; {kept}: try a smaller '
          '--config.optimizer.learning_rate or a larger --config.loss.temperature')
