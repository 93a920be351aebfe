import types
from typing import Any

import numpy as np
import pytest

from instdisc_jax.data import arrays
from instdisc_jax.evaluation.evaluator import Evaluator


@pytest.mark.parametrize('side, width', [(8, 192), (32, 3072), (33, 3072), (64, 3072)])
def test_raw_pixels_are_of_32_x_32_at_most(side, width):
  views = lambda images, side: np.zeros((len(images), side, side, 3), np.uint8)
  evaluator: Any = types.SimpleNamespace(_engine=types.SimpleNamespace(views=views))
  images = arrays.in_memory(np.zeros((5, side, side, 3), np.uint8), None)
  assert Evaluator._pixels(evaluator, images).shape == (5, width)


def test_raw_pixels_of_too_many_images_are_not_compared():
  assert Evaluator.pixels(types.SimpleNamespace(has_labels=True, _train=range(200_001))) is None
