"""The embedded data set: scikit-learn's real handwritten digits, scattered on a larger canvas.

Each 8x8 digit is drawn once, at a random size and position, on a 32x32 canvas, so that two images
of the same digit rarely share pixels and raw pixels are a poor metric. The drawings are fixed: they
do not depend on a run's seed.
"""

from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from sklearn import datasets

NUM_TRAIN = 1297  # the first originals; the last 500, by other writers, are the test set
_CANVAS = 32
_SIZES = (14, 29)  # range of drawn heights, half-open
_Labeled: TypeAlias = tuple[np.ndarray, np.ndarray]


def load() -> tuple[_Labeled, _Labeled]:
  """Returns ((images [1297, 32, 32, 3] uint8, labels [1297]), the same for the 500 test images)."""
  digits: Any = datasets.load_digits()
  random = np.random.RandomState(0)
  images = np.zeros((len(digits.images), _CANVAS, _CANVAS, 3), np.uint8)
  for image, original in zip(images, digits.images):
    size = random.randint(*_SIZES)
    top, left = random.randint(0, _CANVAS - size + 1, size=2)
    drawn = Image.fromarray((original * (255 / 16)).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BILINEAR)
    image[top:top + size, left:left + size] = np.asarray(drawn)[..., None]
  labels = digits.target.astype(np.int32)
  return (images[:NUM_TRAIN], labels[:NUM_TRAIN]), (images[NUM_TRAIN:], labels[NUM_TRAIN:])
