"""Reports of a run during training: metrics.jsonl, TensorBoard events, and a progress line."""

import json
import os
from typing import Any

import jax
from rich import console as rich_console
from rich import progress as rich_progress
import tensorboardX

from instdisc_jax.runtime import errors, files

FILE = 'metrics.jsonl'


class Metrics:
  """Writes measurements in the first process; in the others it does nothing.

  Args:
    workdir: the run's folder.
    step: the step that the run resumes from. Later lines, left by a run that was stopped after
      its last checkpoint, are dropped, so that no step is reported twice.
    tracker: gets the same values, see `tracker.start`; or None. If it fails, the run goes on
      without it.

  Attributes:
    earlier_seconds: wall-clock time spent earlier, according to the kept lines.
    evaluated: steps whose evaluation is in the kept lines.
  """

  def __init__(self, workdir: str | os.PathLike[str], step: int, tracker: Any = None):
    self._lines = self._file = self._events = None
    self._tracker = tracker
    kept = [line for line in read(workdir) if line['step'] <= step]
    self.earlier_seconds = max((line.get('wall_seconds', 0) for line in kept), default=0)
    self.evaluated = {line['step'] for line in kept if {'knn_top1', 'uniformity'} & line.keys()}
    if jax.process_index() != 0:
      return
    self._path = files.place(workdir) / FILE
    self._lines = [json.dumps(line) + '\n' for line in kept]
    files.write(self._path, ''.join(self._lines))
    if not files.in_bucket(self._path):  # files there cannot be appended to
      self._file = self._path.open('a')
    self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1)

  def write(self, step: int, **values: Any) -> None:
    """Adds one line: `values` measured after `step` steps; None is left out of the events."""
    if self._events is None or self._lines is None:
      return
    self._lines.append(json.dumps({'step': step, **values}) + '\n')
    if self._file is None:
      files.write(self._path, ''.join(self._lines))
    else:
      self._file.write(self._lines[-1])
      self._file.flush()
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
      self._events.add_scalar(name, value, step)
    self._track(lambda tracker: tracker.log(known, step=step))

  def _track(self, report):
    if self._tracker is None:
      return
    try:
      report(self._tracker)
    except Exception as e:  # of a service: no network, a full disk
      self._tracker = None
      errors.warn(f'the tracker failed and gets no more metrics ({errors.one_line(e)[:200]}); '
                  f'{FILE} has them all')

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      self._file.close()
    if self._events is not None:
      self._events.close()
    self._track(lambda tracker: tracker.finish())


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl as dicts, without those cut short by a crash or a full disk."""
  path = files.place(workdir) / FILE
  lines = []
  if path.exists():
    for text in path.read_bytes().decode(errors='replace').splitlines():
      try:
        line = json.loads(text)
      except json.JSONDecodeError:
        continue
      if isinstance(line, dict) and isinstance(line.get('step'), int):
        lines.append(line)
  return lines


class Progress:
  """The progress line on the terminal, below a line for each evaluation; first process only."""

  def __init__(self, step: int, total_steps: int):
    self.console = rich_console.Console(soft_wrap=True, highlight=False,
                                        quiet=jax.process_index() != 0)
    self._progress = rich_progress.Progress(
        rich_progress.TextColumn('{task.description}'), rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(), rich_progress.TimeRemainingColumn(),
        console=self.console, transient=True, disable=not self.console.is_terminal,
        speed_estimate_period=1800)  # seconds: a step may take more than one of the usual 30
    self._task = self._progress.add_task('compiling', total=total_steps, completed=step)
    self._progress.start()

  def advance(self, step: int, epoch: int, loss: float, images_per_second: float | None) -> None:
    """Updates the progress line."""
    text = f'epoch {epoch}  loss {loss:.3f}'
    if images_per_second is not None:
      text += f'  {images_per_second:,.0f} images/s'
    self._progress.update(self._task, completed=step, description=text)

  def print(self, text: str) -> None:
    """Prints a permanent line above the progress line."""
    self.console.print(text, markup=False)

  def close(self) -> None:
    """Removes the progress line."""
    self._progress.stop()


def duration(seconds: float) -> str:
  """A time in words, to two digits or so: '40 s', '12 min', '1 h 50 min', '3 days'."""
  minutes = round(seconds / 60)
  if seconds < 90:
    return f'{max(1, round(seconds))} s'
  if minutes < 90:
    return f'{minutes} min'
  if minutes < 36 * 60:
    hours, rest = divmod(5 * round(minutes / 5), 60)
    return f'{hours} h' + (f' {rest} min' if rest else '')
  return f'{round(minutes / 60 / 24)} days'


def progress_bar(title: str) -> rich_progress.Progress:
  """A progress bar on a terminal, nothing elsewhere."""
  console = rich_console.Console(stderr=True)
  return rich_progress.Progress(
      rich_progress.TextColumn(title), rich_progress.BarColumn(),
      rich_progress.MofNCompleteColumn(), rich_progress.TimeRemainingColumn(), console=console,
      transient=True, disable=not console.is_terminal)
