import numpy as np
import pytest

from instdisc_jax.evaluation import feature_store


def test_features_that_the_encoder_lacks_are_not_computed_each_time(sets, tmp_path, monkeypatch):
  model = sets.model
  collect = lambda: feature_store.collect(model.engine, model.variables, model.digest(),
                                          sets.test_images, tmp_path, ('pooled', 'conv9'))
  assert list(collect()) == ['pooled']
  monkeypatch.setattr(model.engine, 'run', lambda *_: pytest.fail('computed again'))
  assert list(collect()) == ['pooled']


def test_a_damaged_file_is_computed_again_and_those_of_other_weights_are_removed(sets, tmp_path):
  model = sets.model
  collect = lambda: feature_store.collect(model.engine, model.variables, model.digest(),
                                          sets.test_images, tmp_path, ('pooled',))['pooled']
  (tmp_path / '0123456789abcdef-0123456789abcdef').mkdir()
  first = np.array(collect())
  folder, = tmp_path.iterdir()
  file, = folder.iterdir()
  file.write_bytes(file.read_bytes()[:1000])
  np.testing.assert_array_equal(collect(), first)
