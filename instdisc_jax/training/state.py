"""The state of a run, how it is sharded, and how it is initialized.

    device k holds   params, batch_stats, opt_state, normalizer, step   (the same on all)
                     bank rows k·n .. (k+1)·n - 1                       (its own)
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from instdisc_jax import bank as bank_lib
from instdisc_jax import config as config_lib
from instdisc_jax import kernels, models, threefry
from instdisc_jax.data import views
from instdisc_jax.runtime import files
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import optimizer as optimizer_lib


class TrainState(flax.struct.PyTreeNode):
  """Everything that changes during training; with the configuration, all that a resume needs.

  Attributes:
    step: int32 scalar, optimizer steps taken.
    params: the encoder's parameters, replicated.
    batch_stats: running batch-norm statistics, replicated.
    opt_state: the optimizer's state, replicated.
    bank: [N padded to `Setup.padded_rows`, D], rows sharded over the mesh.
    normalizer: scalar, NCE's Z; 0 until it is first estimated.
    classifier: class weights of the parametric softmax, sharded like the bank: {'weights',
      'momentum'}; else None.
  """
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  bank: jax.Array
  normalizer: jax.Array
  classifier: Any = None


_SPECS: Any = dict(step=P(), params=P(), batch_stats=P(), opt_state=P(), bank=P(mesh_lib.AXIS),
                   normalizer=P(), classifier=P(mesh_lib.AXIS))
SPECS = TrainState(**_SPECS)


@dataclasses.dataclass(frozen=True)
class Setup:
  """The fixed parts of a run, determined once before it starts.

  Attributes:
    config: the run's configuration, filled.
    encoder: a Linen module.
    optimizer: an optax transformation.
    num_rows: N.
    mesh: the device mesh.
  """
  config: config_lib.Config
  encoder: nn.Module
  optimizer: optax.GradientTransformation
  num_rows: int
  mesh: jax.sharding.Mesh

  @classmethod
  def of(cls, config: config_lib.Config, num_rows: int, mesh: jax.sharding.Mesh) -> 'Setup':
    """A setup with the encoder and the optimizer that the configuration names."""
    return cls(config, create_encoder(config), optimizer_lib.make(config, num_rows), num_rows, mesh)

  @classmethod
  def for_data(cls, config: config_lib.Config, num_rows: int,
               image_shape: tuple[int, ...] | None, mesh: jax.sharding.Mesh) -> 'Setup':
    """A setup whose settings fit the data and the mesh.

    Args:
      config: the run's configuration, filled, with its `dataset.path`; a stream's `augment.size` is
        set in it.
      num_rows: N.
      image_shape: (H, W, 3) of all images, or None if they differ.
      mesh: the device mesh.

    Raises:
      errors.UserError: a setting does not fit the data or the mesh.
    """
    view_size = views.size(config, image_shape)
    if config.dataset.path == 'stream' and view_size[0] == view_size[1]:
      config.augment.size = view_size[0]
    config_lib.validate_for_data(config, num_rows, view_size, mesh.size)
    setup = cls.of(config, num_rows, mesh)
    _ = setup.kernel  # raises where the one that is asked for does not run
    return setup

  @functools.cached_property
  def kernel(self) -> kernels.Choice:
    """How the exact softmax passes over the bank."""
    config = self.config
    return kernels.choose(
        config.loss.kernel, self.mesh.devices.flat[0], dim=config.model.embedding_dim,
        bank_dtype=config.bank.dtype, compute_dtype=config.model.dtype,
        largest_logit=bank_lib.LARGEST_NORM / config.loss.temperature)

  @property
  def padded_rows(self) -> int:
    """N with the padding: a multiple of the device count, and of what the kernel needs."""
    multiple = kernels.row_multiple(self.kernel.name) if self.config.loss.name == 'softmax' else 1
    return mesh_lib.padded(self.num_rows, self.mesh.size * multiple)

  @property
  def inherits_rows(self) -> bool:
    """Whether all rows begin with features, those of an earlier run, see `warm_start`."""
    start = self.config.model.init
    return start is not None and files.place(start).is_dir()

  def remarks(self) -> list[str]:
    """What a user should know about the speed of the loss: lines, or none."""
    loss, rows = self.config.loss, self.padded_rows // self.mesh.size
    if loss.name == 'softmax' and self.kernel.reason is not None:
      return [f'loss.kernel is {self.kernel.name}: {self.kernel.reason}']
    scored = loss.noise_count * (1 if loss.shared_noise else self.config.batch_size)
    if config_lib.draws_noise(loss) and 2 * scored > rows:
      return [f'{loss.name} scores {scored:,} noise rows per step, one by one or among all; '
              f'loss.name=softmax reads the {rows:,} rows of a device once, and is exact']
    return []

  @property
  def reduce_dtype(self) -> Any:
    """The dtype in which gradients are summed over the devices."""
    return jnp.dtype(self.config.model.reduce_dtype or self.wide)

  @property
  def wide(self) -> Any:
    """The dtype of values kept at full precision: float32, or float64 if `model.dtype` is."""
    return jnp.promote_types(self.config.model.dtype, jnp.float32)


def create_encoder(config: config_lib.Config) -> nn.Module:
  """The encoder that a configuration names."""
  return models.create(
      config.model.name, embedding_dim=config.model.embedding_dim, width=config.model.width,
      dtype=config.model.dtype, head=config.model.head,
      batch_norm_axis=mesh_lib.AXIS if config.model.sync_batch_norm else None)


def make_init(setup: Setup, view_size: tuple[int, int]) -> Callable[[], TrainState]:
  """A function that creates a fresh state directly in its shardings; compiled on its first call.

  Args:
    setup: the fixed parts of the run.
    view_size: (height, width) of the views.

  Returns:
    () -> the state, with the same values on any mesh.
  """
  config, mesh = setup.config, setup.mesh

  def rows(key, **how):
    # Drawn with their padding: every device draws its own, and a row depends on its number alone.
    total = setup.padded_rows
    drawn = bank_lib.init(key, total, config.model.embedding_dim, **how)
    return jnp.where(jnp.arange(total)[:, None] < setup.num_rows, drawn, 0)

  def init() -> TrainState:
    params_key, bank_key = jax.random.split(threefry.key(config.seed, threefry.INIT))
    variables: Any = setup.encoder.init(params_key, jnp.zeros((2, *view_size, 3)), train=False)
    bank = rows(bank_key, unit=config.bank.init == 'unit', dtype=config.bank.dtype)
    classifier = None
    if config.loss.name == 'parametric_softmax':
      weights = rows(jax.random.fold_in(bank_key, 1), unit=True, dtype=setup.wide)
      classifier = {'weights': weights, 'momentum': jnp.zeros_like(weights)}
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=variables['params'],
        batch_stats=variables.get('batch_stats', {}),
        opt_state=setup.optimizer.init(variables['params']),
        bank=bank, normalizer=jnp.zeros((), setup.wide),
        classifier=classifier)

  # XLA:CPU spends seconds optimizing the random numbers of every layer, and this runs only once.
  options: Any = {'xla_backend_optimization_level': 0} if mesh_lib.on_cpu(mesh) else None
  return jax.jit(init, out_shardings=shardings(mesh, jax.eval_shape(init)),
                 compiler_options=options)


def shardings(mesh: jax.sharding.Mesh, state: TrainState) -> Any:
  """`SPECS` for every array of `state`, on `mesh`."""
  return jax.tree.map(
      lambda spec, part: jax.tree.map(lambda _: NamedSharding(mesh, spec), part),
      SPECS, state, is_leaf=lambda x: isinstance(x, P))
