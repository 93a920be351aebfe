"""What the compiled step costs, said once at the start, and a trace of some steps."""

import pathlib
import tempfile

import jax

from instdisc_jax import files

# FLOP/s of one device in bfloat16, dense, by the beginning of what JAX calls it; from the makers.
_PEAK = {'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v6 lite': 918e12,
         'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12}
_FIRST_DISPATCH = 3  # that is traced: those before it warm up


def peak(device):
  """FLOP/s of a device, or None of a kind that is not known."""
  kinds = [kind for kind in _PEAK if device.device_kind.startswith(kind)]
  return _PEAK[max(kinds, key=len)] if kinds else None


class Costs:
  """What one step costs a device, by the compiler's own count.

  Args:
    compiled: the step, a `jax.stages.Compiled`; of several steps in a loop it counts one.
    seconds: that its compilation took.
    device: one that it runs on.

  Attributes:
    flops: of one step on one device, or None where the compiler does not say.
  """

  def __init__(self, compiled, seconds, device):
    self.flops = (compiled.cost_analysis() or {}).get('flops') or None
    self._seconds, self._peak = seconds, peak(device)
    memory = compiled.memory_analysis()
    self._bytes = None if memory is None else (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes)

  def __str__(self):
    return ', '.join([f'compiled in {self._seconds:.1f} s']
                     + ([f'{self.flops / 1e9:,.2f} GFLOP a step and device'] if self.flops else [])
                     + ([f'{self._bytes / 2**20:,.0f} MiB a device'] if self._bytes else []))

  def utilisation(self, steps_per_second):
    """Model FLOP utilisation in words: the counted FLOPs in the time, over the device's peak."""
    rate = self.flops * steps_per_second
    share = f', {rate / self._peak:.1%} of its peak' if self._peak else ''
    return f'{rate / 1e12:,.3f} TFLOP/s a device{share}'


class Trace:
  """A trace of some steps for TensorBoard's profiler (XProf), in the workdir.

  Args:
    workdir: the run's folder.
    steps: how many are traced; None for no trace.
  """

  def __init__(self, workdir, steps):
    self._workdir, self._steps = files.place(workdir), steps
    self._dispatches, self._folder, self._end = 0, None, None

  def before(self, step, state):
    """Called before each dispatch, with the steps taken and the state after them."""
    self._dispatches += 1
    if self._folder is not None and step >= self._end:
      jax.block_until_ready(state)
      self.close()
    elif self._steps is not None and self._dispatches == _FIRST_DISPATCH:
      self._folder, self._end = tempfile.TemporaryDirectory(), step + self._steps
      jax.profiler.start_trace(self._folder.name)

  def close(self):
    """Ends the trace, if one is being made, and moves it into the workdir."""
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
