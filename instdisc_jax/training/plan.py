"""The schedule of a run's events, as pure functions of the step."""

import dataclasses
import math

from instdisc_jax import config as config_lib
from instdisc_jax.training import optimizer


@dataclasses.dataclass(frozen=True)
class Plan:
  """The intervals of a run's events.

  Attributes:
    batch_size: B.
    num_rows: N.
    end: the last step.
    log_every_steps: log interval within an epoch.
    evaluate_every_epochs: evaluation interval; 0 for none.
    save_every_steps: checkpoint interval.
  """
  batch_size: int
  num_rows: int
  end: int
  log_every_steps: int
  evaluate_every_epochs: int
  save_every_steps: int

  @classmethod
  def of(cls, config: config_lib.Config, num_rows: int) -> 'Plan':
    """The plan of a configuration."""
    return cls(config.batch_size, num_rows, optimizer.total_steps(config, num_rows),
               config.log_every_steps, config.knn.every_epochs, config.checkpoint.every_steps)

  def epoch(self, step: int) -> int:
    """Epochs completed after `step` steps."""
    return step * self.batch_size // self.num_rows

  def ends_epoch(self, step: int) -> bool:
    """Whether this step completed an epoch."""
    return step > 0 and self.epoch(step) > self.epoch(step - 1)

  def logs(self, step: int) -> bool:
    """Whether a line is logged after this step: at intervals within an epoch, and at its end."""
    into_epoch = step - math.ceil(self.epoch(step) * self.num_rows / self.batch_size)
    return (self.ends_epoch(step) or into_epoch % self.log_every_steps == 0 or step == self.end)

  def saves(self, step: int) -> bool:
    """Whether a checkpoint is saved after this step."""
    return step % self.save_every_steps == 0 or step == self.end

  def evaluates(self, step: int) -> bool:
    """Whether kNN accuracy is measured after this step."""
    every = self.evaluate_every_epochs
    return (every > 0 and self.ends_epoch(step)
            and self.epoch(step) // every > self.epoch(step - 1) // every)

  def steps_to_next_event(self, step: int, most: int) -> int:
    """How many steps to dispatch together after `step`: up to the next log line or checkpoint.

    Evaluations happen at the end of an epoch, which always has a log line.

    Args:
      step: steps taken, fewer than `end`.
      most: an upper limit on the result.
    """
    return next(i for i in range(1, most + 1)
                if i == most or self.logs(step + i) or self.saves(step + i))
