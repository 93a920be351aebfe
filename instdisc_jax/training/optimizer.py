"""The optimizer and its learning rate: SGD with momentum, as published, or AdamW."""

import math

import jax
import optax

from instdisc_jax import config as config_lib


def total_steps(config: config_lib.Config, num_rows: int) -> int:
  """Steps of the full run: `config.steps`, or as many as complete `config.epochs`."""
  if config.steps is not None:
    return config.steps
  return math.ceil(config.epochs * num_rows / config.batch_size)


def learning_rate_schedule(config: config_lib.Config, num_rows: int) -> optax.Schedule:
  """Step -> learning rate, which decays at each milestone, in epochs (epoch of step t = t·B // N).

  With the schedule `cosine` it rises over `warmup_epochs` and falls to 0 at the end of the run.
  """
  if config.optimizer.schedule == 'cosine':
    end = total_steps(config, num_rows)
    warmup = math.ceil(config.optimizer.warmup_epochs * num_rows / config.batch_size)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.optimizer.learning_rate, config.optimizer.learning_rate,
        min(warmup, end - 1), end)
  boundaries = {math.ceil(epoch * num_rows / config.batch_size): config.optimizer.milestone_factor
                for epoch in config.optimizer.milestones}
  return optax.piecewise_constant_schedule(config.optimizer.learning_rate, boundaries)


def remarks(config: config_lib.Config) -> list[str]:
  """What a user should know about the schedule of a run of some epochs: lines, or none."""
  epochs, milestones = config.epochs, config.optimizer.milestones
  if (config.optimizer.schedule == 'cosine' or config.steps is not None or not milestones
      or min(milestones) < epochs):
    return []
  shares = tuple(round(share * epochs) for share in (0.6, 0.8))
  return [f'the learning rate never decays: the run ends after epoch {epochs}, and '
          f'optimizer.milestones is {tuple(milestones)}; {shares} would be in proportion']


def _kernels(params):
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def make(config: config_lib.Config, num_rows: int) -> optax.GradientTransformation:
  """SGD with momentum and weight decay on all parameters (PyTorch's), or AdamW.

  AdamW (Loshchilov and Hutter, 2019) has β1 = `optimizer.momentum` and β2 = 0.999; its weight decay
  is that of kernels alone: not of biases, scales, or the class token and positions of a ViT.
  """
  optimizer, schedule = config.optimizer, learning_rate_schedule(config, num_rows)
  if optimizer.name == 'adamw':
    return optax.adamw(schedule, b1=optimizer.momentum, weight_decay=optimizer.weight_decay,
                       mask=_kernels)
  return optax.chain(optax.add_decayed_weights(optimizer.weight_decay),
                     optax.sgd(schedule, momentum=optimizer.momentum))
