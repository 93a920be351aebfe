"""The cost of the compiled step, reported at the start, and a trace of some steps."""

import os
import pathlib
import tempfile
from typing import Any

import jax

from instdisc_jax.runtime import files, hardware, metrics

_FIRST_DISPATCH = 3  # the first dispatch traced; earlier ones warm up
_GPU_RATE, _GPU_STEP = 10e12, 2e-3  # FLOP/s in use and least seconds per step, for a rough estimate


class Costs:
  """The cost of one step on a device, as counted by the compiler.

  Args:
    compiled: the compiled step; of several steps in a loop, one is counted.
    seconds: compile time.
    device: a device that it runs on.

  Attributes:
    flops: FLOPs of one step on one device, or None if the compiler does not report them.
  """

  def __init__(self, compiled: jax.stages.Compiled, seconds: float, device: Any):
    analysis: Any = compiled.cost_analysis() or {}
    self.flops: float | None = analysis.get('flops') or None
    chip = hardware.of(device)
    self._seconds, self._peak = seconds, None if chip is None else chip.flops
    memory: Any = compiled.memory_analysis()
    self._bytes = None if memory is None else (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes)

  def __str__(self) -> str:
    return ', '.join(
        [f'compiled in {self._seconds:.1f} s']
        + ([f'{self.flops / 1e9:,.2f} GFLOP per step and device'] if self.flops else [])
        + ([f'{self._bytes / 2**20:,.0f} MiB per device'] if self._bytes else []))

  def utilization(self, steps_per_second: float) -> str:
    """FLOP/s per device in words, and their share of its peak; '' if the FLOPs are unknown."""
    if self.flops is None:
      return ''
    rate = self.flops * steps_per_second
    share = f', {rate / self._peak:.1%} of peak' if self._peak else ''
    return f'{rate / 1e12:,.3f} TFLOP/s per device{share}'

  def on_a_gpu(self, steps: int) -> str:
    """A rough model of the time that these steps would take on a GPU, in words; '' if unknown."""
    if self.flops is None:
      return ''
    time = metrics.duration(steps * max(self.flops / _GPU_RATE, _GPU_STEP))
    return (f'a GPU would take about {time} for them, if images are read as fast (modeled: '
            f'{_GPU_RATE / 1e12:.0f} TFLOP/s, but at least {_GPU_STEP * 1e3:.0f} ms per step)')


class Trace:
  """A trace of some steps for TensorBoard's profiler (XProf), in the workdir.

  Args:
    workdir: the run's folder.
    steps: number of steps to trace; None for no trace.
  """

  def __init__(self, workdir: str | os.PathLike[str], steps: int | None):
    self._workdir, self._steps = files.place(workdir), steps
    self._dispatches, self._folder, self._end = 0, None, 0

  def before(self, step: int, state: Any) -> None:
    """Called before each dispatch, with the steps taken and the state after them."""
    self._dispatches += 1
    if self._folder is not None and step >= self._end:
      jax.block_until_ready(state)
      self.close()
    elif self._steps is not None and self._dispatches == _FIRST_DISPATCH:
      self._folder, self._end = tempfile.TemporaryDirectory(), step + self._steps
      jax.profiler.start_trace(self._folder.name)

  def close(self) -> None:
    """Ends the trace, if there is one, and moves it into the workdir."""
    if self._folder is None:
      return
    jax.profiler.stop_trace()
    made = pathlib.Path(self._folder.name)
    for file in made.rglob('*'):
      if file.is_file():
        target = self._workdir / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write(target, file.read_bytes())
    self._folder.cleanup()
    self._folder = self._steps = None
