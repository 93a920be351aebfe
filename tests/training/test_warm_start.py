import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import data, kernels, models
from instdisc_jax.data import folder
from instdisc_jax.interop import layouts
from instdisc_jax.runtime import checkpoint, errors
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import warm_start


def _config(init, **model):
  config = config_lib.default()
  config.model.update(dict(name='resnet18', width=64, embedding_dim=16, init=str(init)) | model)
  return config


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """(file, state dict) in torchvision's layout, with a head of 16 outputs."""
  safetensors = pytest.importorskip('safetensors.numpy')
  random = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: models.create('resnet18', embedding_dim=16).init(
      jax.random.key(0), np.zeros((1, 64, 64, 3)), train=False))
  state_dict = layouts.to_torchvision(jax.tree.map(
      lambda s: random.normal(size=s.shape).astype(np.float32), shapes), 'resnet18')
  file = tmp_path_factory.mktemp('weights') / 'a.safetensors'
  safetensors.save_file({k: np.ascontiguousarray(v) for k, v in state_dict.items()}, file)
  return file, state_dict


@pytest.mark.slow
def test_weights_of_a_file_become_the_encoder(weights):
  file, state_dict = weights
  variables = warm_start.read_weights(_config(file))
  back = layouts.to_torchvision(variables, 'resnet18')
  for key, value in back.items():
    np.testing.assert_array_equal(value, state_dict[key])


@pytest.mark.slow
def test_weights_of_another_encoder_are_refused_by_name(weights):
  file, _ = weights
  for model, message in (
      (dict(name='resnet50'), "has model.name = resnet18, not resnet50: set --config.model.name="),
      (dict(width=32), 'has model.width = 64, not 32'),
      (dict(embedding_dim=128), 'has model.embedding_dim = 16, not 128')):
    with pytest.raises(errors.UserError, match=message):
      warm_start.read_weights(_config(file, **model))


def test_the_weights_of_a_run_become_the_encoder_on_any_devices(trained):
  workdir, _, config = trained
  config = config.copy_and_resolve_references()
  config.model.init = str(workdir)
  variables = warm_start.read_weights(config)
  mesh = mesh_lib.make(jax.devices()[:4])
  fresh = state_lib.make_init(state_lib.Setup.of(config, 128, mesh), (32, 32))()
  state = warm_start.with_weights(fresh, variables)
  for name in ('params', 'batch_stats'):
    for old, new, at_first in zip(*map(jax.tree.leaves, (
        variables[name], getattr(state, name), getattr(fresh, name)))):
      np.testing.assert_array_equal(old, new)
      assert new.sharding == at_first.sharding
  np.testing.assert_array_equal(state.bank, fresh.bank)


def _state(seed, num_rows, mesh):
  random = np.random.default_rng(seed)
  rows = lambda: mesh_lib.pad_rows(jnp.asarray(random.standard_normal((num_rows, 4)), jnp.float32),
                                mesh.size)
  state = state_lib.TrainState(
      step=jnp.int32(3), params={'w': jnp.ones(2)}, batch_stats={}, opt_state=(), bank=rows(),
      normalizer=jnp.float32(0), classifier={'weights': rows(), 'momentum': rows()})
  return jax.device_put(state, state_lib.shardings(mesh, state))


def test_known_images_keep_bank_rows_and_class_weights_and_new_ones_get_fresh_ones(tmp_path):
  old_mesh, mesh = (mesh_lib.make(jax.devices()[:n]) for n in (1, 8))
  old, fresh = _state(1, 6, old_mesh), _state(2, 7, mesh)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints', 1, 6)
  checkpoints.save(old)
  checkpoints.close()
  workdir_lib.write(tmp_path, {}, '6 files')
  sizes = {f'{i}.png': 100 + i for i in range(6)}
  folder.keep({'files': sizes, 'unreadable': {}}, list(sizes), tmp_path)
  rows = np.array([4, -1, 0, 1, 3, 2, -1])  # where each of 7 images was among the 6
  names = ['4.png', 'new.png', '0.png', '1.png', '3.png', '2.png', '5.png']
  now = {name: sizes.get(name, 9) for name in names} | {'5.png': 7}  # which is another image now
  source = data.Images(np.zeros((7, 8, 8, 3), np.uint8), None, '7 files', names=names)
  dataset = data.Dataset('folder:x', source, listing={'files': now, 'unreadable': {}})
  new_features = np.full((2, 4), 0.5, np.float32)

  def embed(state, images):
    assert images.names == ['new.png', '5.png']
    yield new_features[:1]
    yield new_features[1:]

  state = warm_start.with_rows(fresh, str(tmp_path), dataset, embed, mesh)
  known = rows >= 0
  bank = np.asarray(state.bank)
  np.testing.assert_array_equal(bank[:7][known], np.asarray(old.bank)[rows[known]])
  np.testing.assert_array_equal(bank[:7][~known], new_features)
  for name in ('weights', 'momentum'):
    values = np.asarray(state.classifier[name])
    np.testing.assert_array_equal(values[:7][known],
                                  np.asarray(old.classifier[name])[rows[known]])
    np.testing.assert_array_equal(values[:7][~known],
                                  np.asarray(fresh.classifier[name])[:7][~known])
    assert not values[7:].any() and state.classifier[name].sharding == fresh.bank.sharding


def test_all_rows_of_a_run_are_padded_as_the_new_run_s_kernel_needs(trained):
  workdir, _, config = trained
  dataset = data.load(config.dataset, config.seed)
  mesh = mesh_lib.make(jax.devices()[:4])
  setup = state_lib.Setup.of(config, 128, mesh)
  vars(setup)['kernel'] = kernels.Choice('cudnn')  # as on a GPU
  fresh = state_lib.make_init(setup, (32, 32))()
  state = warm_start.with_rows(fresh, str(workdir), dataset, lambda *_: (), mesh)
  bank = checkpoint.read(workdir / 'checkpoints', ['bank'])['bank']
  assert state.bank.shape == fresh.bank.shape == (1024, 16)
  np.testing.assert_array_equal(state.bank[:128], bank)
  assert not np.any(state.bank[128:])
