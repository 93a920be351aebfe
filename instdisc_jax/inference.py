"""A trained run as an object: embeddings, neighbors and classes of any images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
from typing import Any
import weakref

import jax
from jaxtyping import Float, Int
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import data, linalg, neighbors
from instdisc_jax.data import decode, folder
from instdisc_jax.data import images as images_lib
from instdisc_jax.evaluation import classifier, embedding, feature_store, knn
from instdisc_jax.evaluation.classifier import Classifier, Predictions
from instdisc_jax.runtime import checkpoint, digest, errors, files
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training import import_checkpoint as importing
from instdisc_jax.training import state as state_lib

FEATURES = (embedding.EMBEDDING, 'pooled', *reversed(embedding.STAGES[:-1]))


def load(workdir: str | os.PathLike[str], features: str | None = None,
         check: Callable[[], None] = lambda: None) -> 'Model':
  """Opens the newest intact checkpoint of a workdir; the bank is read on demand.

  Args:
    workdir: the folder of a run, or one made by `convert`; or a file with the weights of a known
      encoder, see `training.import_checkpoint`.
    features: what represents an image: 'embedding', 'pooled', or 'conv1' to 'conv5', of unit norm;
      by default the embedding or, of weights that were never trained here, 'pooled'.
    check: called regularly while images are encoded; an exception that it raises ends the work.

  Returns:
    A `Model` on all devices.

  Raises:
    errors.UserError: there is no intact checkpoint, or the encoder has no such features.
  """
  place = files.place(workdir)
  if not files.in_bucket(place) and place.is_file():
    return _of_file(place, features, check)
  return Model(workdir, _config(workdir), features, check)


def _of_file(file, features, check):
  """A `Model` with the weights of a file."""
  if jax.process_count() > 1:
    raise errors.UserError(f"'{file}' can be opened by one process only", setting='--workdir',
                           remedy='convert it first, and set <--workdir> to that folder')
  folder = tempfile.TemporaryDirectory(prefix='instdisc-')
  found, *_ = importing.import_checkpoint(file, folder.name)
  model = Model(folder.name, _config(folder.name), features, check)
  weakref.finalize(model, folder.cleanup)
  print(f'{file}: {found}; images are represented by {model.features}, of views of '
        f'{model.config.augment.size} pixels', file=sys.stderr)
  return model


def _config(workdir):
  """The configuration of a workdir; imported weights see views of their family's usual size."""
  settings, _ = workdir_lib.read(workdir)
  config = config_lib.from_json(settings)
  if 'seed' not in settings and config.augment.size is None:
    config.augment.size = 32 if config.model.name.endswith('_cifar') else 224
  return config


class Model:
  """An encoder and its memory bank.

  Args:
    workdir: the folder they come from.
    config: the run's configuration.
    features: see `load`.
    check: likewise.

  Attributes:
    workdir: the folder, as a path.
    config: a `ConfigDict`.
    features: what represents an image.
    step: the checkpoint's step.
    has_bank: whether there is a bank; imported weights may lack one.
    encoder: a Linen module.
    variables: the encoder's {'params', 'batch_stats'}.
    mesh: all devices, of all processes.
    engine: computes features of images, on all devices.
  """

  def __init__(self, workdir: str | os.PathLike[str], config: config_lib.Config,
               features: str | None = None, check: Callable[[], None] = lambda: None):
    self.workdir, self.config = files.place(workdir), config
    state = self._read('step', 'params', 'batch_stats')
    self.has_bank = 'bank' in state['fields']
    default = embedding.EMBEDDING if self.has_bank else 'pooled'
    self.features = default if features is None else features
    if self.features not in FEATURES:
      raise errors.UserError(f"--features is '{features}'", ', '.join(FEATURES[:-1])
                             + f' or {FEATURES[-1]}', setting='--features')
    self.step = int(state['step'])
    self.encoder = state_lib.create_encoder(config)
    self.mesh = mesh_lib.make()
    self.variables = jax.tree.map(
        lambda x: mesh_lib.replicate(x, self.mesh),
        {'params': state['params'], 'batch_stats': state.get('batch_stats', {})})
    self.engine = embedding.Engine(config, self.encoder, self.mesh, check=check)

  def _read(self, *names):
    return checkpoint.read(self.workdir / 'checkpoints', names)

  @functools.cached_property
  def _bank(self):
    bank = self._read('bank')['bank']
    return None if bank is None else linalg.unit(np.asarray(bank, np.float32))

  @property
  def bank(self) -> Float[np.ndarray, 'N D']:
    """The unit-norm rows; raises `errors.UserError` if there is no bank."""
    if self._bank is None:
      raise errors.UserError(f"'{self.workdir}' has weights but no memory bank",
                             remedy='train on it first', setting='--workdir')
    return self._bank

  @property
  def was_trained(self) -> bool:
    """Whether the workdir is that of a run; else it holds weights only."""
    return 'dataset.name' in workdir_lib.read(self.workdir)[0]

  @property
  def dataset(self) -> data.Dataset:
    """The data that the run was trained on, without files that were added to a folder since.

    Raises:
      errors.UserError: it is gone, or has changed.
    """
    return self._dataset

  @functools.cached_property
  def _dataset(self):
    settings, fingerprint = workdir_lib.read(self.workdir)
    if 'dataset.name' not in settings:
      raise errors.UserError(
          f"'{self.workdir}' holds weights without the images they were trained on",
          remedy='train on them first, with this <--workdir>', setting='--workdir')
    dataset = data.load(self.config.dataset, self.config.seed, self.workdir, allow_added=True)
    if fingerprint not in (None, dataset.train.fingerprint):
      raise errors.UserError(
          f"'{self.workdir}' was trained on other data named {dataset.name}",
          remedy='restore them', setting='dataset.name')
    return dataset.kept(self.config.dataset.path)

  @property
  def labels(self) -> Int[np.ndarray, ' N'] | None:
    """[N] int32 class of each row, or None."""
    return self.dataset.train.labels

  @property
  def names(self) -> Sequence[str] | None:
    """The path of each row's image, or None if the images are not files."""
    return self.dataset.train.names

  @property
  def class_names(self) -> tuple[str, ...] | None:
    """The name of each class, or None."""
    return self.dataset.class_names

  def embed(self, images: Any) -> Float[np.ndarray, 'B D']:
    """Embeddings, as the evaluation computes them, or other features of unit norm.

    Args:
      images: [B, H, W, 3] uint8, or one [H, W, 3], or a list of such images and paths, of any
        size if the run has an `augment.size`.

    Returns:
      [B, D] float32, unit-norm.

    Raises:
      errors.UserError: wrong shape or type, or a file that cannot be read as an image.
    """
    if (getattr(images, 'ndim', None) in (0, 3) or not hasattr(images, '__iter__')
        or isinstance(images, (str, os.PathLike, bytes))):
      images = [images]
    given = [_checked(image, f'image {i}') for i, image in enumerate(images)]
    source: Any = _Given(given)
    arrays = [x for x in given if isinstance(x, np.ndarray)]
    if (self.config.dataset.path == 'resident' and len(arrays) == len(given)
        and len({x.shape for x in arrays}) == 1):
      source = np.stack(arrays)  # cropped on the device, as in the run's evaluation
    names = [f"'{x}'" if isinstance(x, pathlib.Path) else f'image {i}' for i, x in enumerate(given)]
    parts = list(self.embed_all(_Named(source, None, '', names))) if given else []
    return np.concatenate(parts or [np.zeros((0, self.config.model.embedding_dim), np.float32)])

  def embed_all(self, images: data.Images, first: int = 0) -> Iterator[Float[np.ndarray, 'n D']]:
    """Embeddings of many images, read and decoded ahead of the encoder.

    Args:
      images: `Images`.
      first: the image to start with.

    Yields:
      [n, D] float32, for the next n images.

    Raises:
      errors.UserError: see `embed`; the message names the image.
    """
    for part in self.engine.run(self.variables, images, (self.features,), first):
      yield self._unit(part)

  def _unit(self, part):
    """The features of some images; only embeddings have unit norm by themselves."""
    if self.features not in part:
      raise errors.UserError(f'{self.config.model.name} has no features {self.features}',
                             remedy='set <--features>=pooled', setting='--features')
    x = part[self.features]
    return x if self.features == embedding.EMBEDDING else linalg.unit(np.asarray(x, np.float32))

  @property
  def _cache(self) -> pathlib.Path | None:
    """The folder of what the weights have computed; None in a bucket or a read-only folder."""
    if files.in_bucket(self.workdir) or not os.access(self.workdir, os.W_OK):
      return None
    return pathlib.Path(self.workdir) / 'features'

  @property
  def maps(self) -> pathlib.Path | None:
    """A folder for maps of the embeddings, which goes when the weights change; or None."""
    return self._cache and self._cache / f'{self.digest()[:16]}-maps'

  def fresh(self, images: data.Images) -> Float[np.ndarray, 'N D']:
    """The embeddings of the central views of many images.

    They are computed once, and kept in the workdir under the digest of the weights, unless that is
    a bucket or cannot be written.

    Raises:
      errors.UserError: an image cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
      place = self._cache or pathlib.Path(scratch)
      found = feature_store.collect(self.engine, self.variables, self.digest(), images, place,
                                    [self.features])
      return np.array(self._unit(found))

  def neighbors(self, images: Any, k: int = 20
                ) -> tuple[Float[np.ndarray, 'B k'], Int[np.ndarray, 'B k']]:
    """The rows of the bank nearest to each image.

    Args:
      images: see `embed`.
      k: number of rows, at most N.

    Returns:
      (similarity [B, k] float32, row [B, k] int32), most similar first; `names` and `labels` tell
      which images they are.

    Raises:
      errors.UserError: see `embed`; or there is no bank, or k is out of range.
    """
    if self.features != embedding.EMBEDDING:
      raise errors.UserError(f'features is {self.features}', 'embedding, as the rows of the bank')
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= len(self.bank):
      raise errors.UserError(f'k is {k}', f'from 1 to the {len(self.bank)} rows of the bank')
    similarity, row = neighbors.nearest(self.embed(images), self.bank, k=int(k))
    return np.asarray(similarity), np.asarray(row)

  def classify(self, images: Any) -> Int[np.ndarray, ' B']:
    """Weighted kNN (Section 3.4) with the K and τ of the run.

    Args:
      images: see `embed`.

    Returns:
      [B] int class indices; `class_names` holds the names.

    Raises:
      errors.UserError: see `neighbors`; or the data have no labels.
    """
    if self.labels is None:
      raise errors.UserError(f'{self.dataset.name} has no labels to classify with')
    similarity, row = self.neighbors(images, min(self.config.knn.neighbors, len(self.bank)))
    classes, number = np.unique(self.labels, return_inverse=True)
    scores = knn.vote(similarity, number[row], self.config.knn.temperature, len(classes))
    return classes[np.argmax(scores, axis=1)]

  def fit_labels(self, labels: Mapping[str | os.PathLike[str], str],
                 method: str = 'knn') -> 'Labeled':
    """Learns classes from a few labeled images.

    Args:
      labels: {path of an image: its label}.
      method: 'knn', the weighted vote of the nearest; or 'linear', logistic regression.

    Returns:
      A classifier of any images.

    Raises:
      errors.UserError: there are fewer than two classes, or an image cannot be read.
    """
    paths = list(labels)
    return Labeled(self, classifier.fit(self.embed(paths), [labels[path] for path in paths],
                                        [os.fspath(path) for path in paths], method,
                                        self.config.knn.temperature))

  def load_labels(self, path: str | os.PathLike[str]) -> 'Labeled':
    """What `Labeled.save` wrote; it belongs to the weights that it was fitted with."""
    return Labeled(self, classifier.load(path))

  def rows_of(self, images: data.Images, sizes: Mapping[str, int]) -> Int[np.ndarray, ' n']:
    """The bank's row of each image of a folder that the run was trained on.

    An image has a row if the run knows its name and size, and if it is in the run's own folder or
    identical, byte for byte, to the image there.

    Args:
      images: the images of the folder.
      sizes: {path: size in bytes}.

    Returns:
      [n] int32, -1 where there is none.
    """
    listing = folder.read(self.workdir)
    if listing is None or images.names is None or not self.has_bank:
      return np.full(len(images), -1, np.int32)
    rows = folder.rows_of(listing, images.names, sizes)
    return folder.only_same(rows, images.names, images.files.root,
                            self.config.dataset.name.partition(':')[2])

  def digest(self) -> str:
    """SHA-256 of the weights."""
    variables = self.variables['params'], self.variables['batch_stats']
    return digest.of_arrays(jax.tree.leaves(jax.device_get(variables)))


@dataclasses.dataclass(frozen=True)
class Labeled:
  """A classifier of images, fitted to the labels of a few.

  Attributes:
    model: embeds the images.
    classifier: classifies the embeddings; it has the accuracy by leave-one-out.
  """
  model: Model
  classifier: Classifier

  def predict(self, images: Any) -> tuple[list[str], Predictions]:
    """(labels, what else is known of them) for images as `Model.embed` takes them."""
    found = self.classifier.predict(self.model.embed(images))
    return [self.classifier.class_names[i] for i in found.label], found

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the classifier to an .npz file; the model is not in it."""
    self.classifier.save(path)


@dataclasses.dataclass(frozen=True)
class _Given:
  """Images given as arrays and paths; files are read on demand."""
  images: list

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    image = self.images[i]
    if not isinstance(image, pathlib.Path):
      return image
    try:
      return image.read_bytes()
    except ValueError as e:  # a name that no file can have
      raise decode.UnreadableError(f'cannot be read ({e})') from e


class _Named(images_lib.Images):
  """Images named as the caller gave them; their errors suggest no setting to change."""

  def name(self, i):
    return '' if self.names is None else self.names[i]

  def _read(self, i, read):
    try:
      return super()._read(i, read)
    except images_lib.UnreadableImage as e:
      raise images_lib.UnreadableImage(e.found) from e


def _checked(image, name):
  """A uint8 array [H, W, 3] or a path; raises `errors.UserError` for anything else."""
  if isinstance(image, (str, os.PathLike)):
    return pathlib.Path(image)
  if not isinstance(image, np.ndarray) and hasattr(image, '__array__'):
    image = np.asarray(image)
  if not isinstance(image, np.ndarray):
    raise errors.UserError(f'{name} is a {type(image).__name__}',
                           'a uint8 array [H, W, 3] or a path')
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
    raise errors.UserError(f'{name} is {image.dtype} {list(image.shape)}', 'uint8 [H, W, 3]')
  return image

