import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

import instdisc_jax
from instdisc_jax import config as config_lib
from instdisc_jax import convert, models
from instdisc_jax.interop import onnx
from instdisc_jax.runtime import workdir

SIDE = 64
QUICK = ('resnet10', 'resnet10_cifar', 'alexnet')


@pytest.mark.parametrize('name', [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in config_lib.MODELS])
def test_onnxruntime_computes_the_same_for_any_batch_size(name):
  encoder = models.create(name, width=4, embedding_dim=8)
  images = np.random.default_rng(0).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
  variables = encoder.init(jax.random.key(0), images[:1].astype('f4'), train=False)
  # Biases and statistics that are not the initial ones. One constant added to all would leave
  # transformers ill-conditioned: layer norms would subtract nearly all of it.
  random = np.random.default_rng(1)
  variables = jax.tree.map(
      lambda x: x + 0.1 * random.standard_normal(x.shape, np.float32), variables)
  scaled = lambda x: (x.astype(jnp.float32) - 120) / 60
  encode = lambda x: {'embedding': encoder.apply(variables, scaled(x), train=False)}
  session = onnxruntime.InferenceSession(onnx.export(encode, images.shape[1:], {}))
  for count in (1, 5):
    found, = session.run(None, {'images': images[:count]})
    np.testing.assert_allclose(found, encode(images[:count])['embedding'], atol=2e-6)


@pytest.mark.parametrize('function, words', [
    (lambda x: {'y': jnp.sin(x.astype(jnp.float32)).sum((2, 3))}, 'sin as ONNX'),
    (lambda x: {'y': x.astype(jnp.float32).reshape(-1, 3)}, 'joins the batch')])
def test_what_cannot_be_written_is_named(function, words):
  with pytest.raises(NotImplementedError, match=words):
    onnx.export(function, (4, 4, 3), {})


def test_a_run_as_onnx_gives_the_embeddings_of_the_run(trained, tmp_path):
  file = tmp_path / 'encoder.onnx'
  assert convert.main([f'--workdir={trained[0]}', f'--to={file}']) == 0
  model = instdisc_jax.load(trained[0])
  images = model.dataset.train.files[:3]
  session = onnxruntime.InferenceSession(str(file))
  embedding, pooled = session.run(['embedding', 'pooled'], {'images': images})
  np.testing.assert_allclose(embedding, model.embed(images), atol=2e-6)
  expected = instdisc_jax.load(trained[0], features='pooled').embed(images)
  np.testing.assert_allclose(pooled, expected, atol=2e-6)
  kept = session.get_modelmeta().custom_metadata_map
  assert kept['model'] == model.config.model.name and kept['step'] == str(model.step)


def test_a_bfloat16_run_is_written_in_float32(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  settings, fingerprint = workdir.read(tmp_path / 'run')
  workdir.write(tmp_path / 'run', settings | {'model.dtype': 'bfloat16'}, fingerprint)
  assert convert.main([f'--workdir={tmp_path / "run"}', f'--to={tmp_path / "a.onnx"}']) == 0
  images = instdisc_jax.load(trained[0]).dataset.train.files[:3]
  session = onnxruntime.InferenceSession(str(tmp_path / 'a.onnx'))
  embedding, = session.run(['embedding'], {'images': images})
  np.testing.assert_allclose(embedding, instdisc_jax.load(trained[0]).embed(images), atol=2e-6)


def test_without_the_package_one_line_says_how_to_install_it(trained, tmp_path):
  block = ("import sys; sys.modules['onnx'] = None; from instdisc_jax import convert; "
           f"sys.exit(convert.main(['--workdir={trained[0]}', '--to={tmp_path}/e.onnx']))")
  found = subprocess.run([sys.executable, '-c', block], capture_output=True, text=True)
  assert found.returncode == 2
  assert found.stderr == ("error: this file needs onnx, which is not installed: "
                          "pip install 'instdisc_jax[onnx]'\n")
