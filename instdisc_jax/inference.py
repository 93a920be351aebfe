"""A trained workdir as an object: embeddings, neighbours and classes of any pictures."""

from concurrent import futures
import functools
import os
import pathlib

import jax
import numpy as np

from instdisc_jax import checkpoint, data, errors, files, models, train
from instdisc_jax import config as config_lib
from instdisc_jax import workdir as workdir_lib
from instdisc_jax.data import decode, folder, stream
from instdisc_jax.evaluation import features, knn, report

CHUNK = 64  # most pictures per call of the encoder


class Unreadable(errors.UserError):
  """A file that gives no picture."""


def load(workdir):
  """Opens the newest sound checkpoint of a workdir.

  Args:
    workdir: of a run, or made by `convert`.

  Returns:
    A `Model`.

  Raises:
    errors.UserError: there is none.
  """
  settings, _ = workdir_lib.read(workdir)
  config = config_lib.default()
  known = config_lib.flatten(config)  # `convert` leaves settings out: they keep their defaults
  config.update_from_flattened_dict({
      key: tuple(value) if isinstance(value, list) else value
      for key, value in settings.items() if key in known})
  return Model(workdir, config, checkpoint.read(files.place(workdir) / 'checkpoints'))


class Model:
  """An encoder and its memory bank.

  Args:
    workdir: where they come from.
    config: of the run.
    state: as `checkpoint.read` gives it.

  Attributes:
    workdir: a path.
    config: a `ConfigDict`.
    step: of the checkpoint.
    bank: [N, D] unit-norm rows, `np.ndarray`; None of weights that came without one.
    encoder: a Linen module.
    variables: its (params, batch_stats).
  """

  def __init__(self, workdir, config, state):
    self.workdir, self.config, self.step = files.place(workdir), config, int(state['step'])
    bank = state['bank']
    self.bank = None if bank is None else knn.unit(np.asarray(bank, np.float32))
    self.encoder = models.create(config.model.name, embedding_dim=config.model.embedding_dim,
                                 width=config.model.width, dtype=config.model.dtype)
    self.variables = state['params'], state['batch_stats']
    # Of a resident run the device cuts the views out, as in its evaluation; else the host does.
    self._side = None if config.dataset.path == 'resident' else config.augment.size
    size = None if config.augment.size is None else (config.augment.size,) * 2
    self._encode = features.map_over_mesh(
        self.encoder, train.make_mesh(jax.local_devices()[:1]), config.augment.mean,
        config.augment.std, size)

  @functools.cached_property
  def dataset(self):
    """The `data.Dataset` that the run was trained on; raises `errors.UserError` if it is gone."""
    settings, fingerprint = workdir_lib.read(self.workdir)
    if 'dataset.name' not in settings:
      raise errors.UserError(f"'{self.workdir}' holds weights and does not know their pictures: "
                             'train on them first, with this --workdir')
    dataset = data.load(self.config.dataset, self.config.seed, self.workdir)
    if fingerprint not in (None, dataset.train.fingerprint):
      raise errors.UserError(f"'{self.workdir}' was trained on other data of the name "
                             f'{dataset.name}: put them back')
    return dataset

  @property
  def labels(self):
    """[N] int32 class of each row, or None."""
    return self.dataset.train.labels

  @property
  def class_names(self):
    """The name of each class, or None."""
    return self.dataset.class_names

  def embed(self, images):
    """Embeddings, as the evaluation computes them.

    Args:
      images: [B, H, W, 3] uint8, or one [H, W, 3], or a list of such pictures and of paths, of any
        sizes where the run has an `augment.size` (and no `dataset.path=resident`).

    Returns:
      [B, D] float32 unit-norm `np.ndarray`.

    Raises:
      errors.UserError: of another shape or type, or a file that gives no picture.
    """
    if (getattr(images, 'ndim', None) in (0, 3) or not hasattr(images, '__iter__')
        or isinstance(images, (str, os.PathLike, bytes))):
      images = [images]
    views = [_view(image, f'image {i}', self._side) for i, image in enumerate(images)]
    _check_one_size(views, self._side, [f'image {i}' for i in range(len(views))])
    result = np.zeros((len(views), self.config.model.embedding_dim), np.float32)
    for start in range(0, len(views), CHUNK):
      part = views[start:start + CHUNK]
      count = min(CHUNK, 1 << (len(part) - 1).bit_length())  # few sizes are compiled
      padded = np.stack(part + part[-1:] * (count - len(part)))
      result[start:start + len(part)] = self._encode(*self.variables, padded, 0, count)[:len(part)]
    return result

  def embed_all(self, source, first=0):
    """Embeddings of many pictures, read and decoded ahead of the encoder.

    Args:
      source: `data.Pictures`.
      first: the chunk to begin with.

    Yields:
      [n, D] float32 of the next `CHUNK` pictures; the last has what is left.

    Raises:
      errors.UserError: see `embed`; it names the picture.
    """
    yield from map(self.embed, self.views_of(source, first))

  def views_of(self, source, first=0):
    """Lists of up to `CHUNK` views, as `embed_all` reads them."""
    count = -(-len(source) // CHUNK)
    read = functools.partial(_read_views, source=source, side=self._side, size=CHUNK)
    chunks = stream.in_background(read, first, count,
                                  stream.workers(self.config.dataset.workers) if count > 16 else 0)
    reference = [] if self._side is not None or not first else [_read_view(0, source, None)]
    try:
      for number, views in enumerate(chunks, first):
        names = [source.name(number * CHUNK + i) for i in range(len(views))]
        reference = reference or views[:1]
        _check_one_size(reference + views, self._side, [source.name(0), *names])
        yield views
    finally:
      chunks.close()

  def views_at(self, source, rows):
    """[b, H, W, 3] uint8 of the pictures at `rows` [b]; raises `errors.UserError`, see `embed`."""
    over = map if isinstance(source.files, np.ndarray) else self._readers.map
    views = list(over(lambda i: _read_view(i, source, self._side), rows))
    _check_one_size(views, self._side, [source.name(i) for i in rows])
    return np.stack(views)

  @functools.cached_property
  def _readers(self):
    return futures.ThreadPoolExecutor(os.cpu_count())

  def neighbors(self, images, k=20):
    """The rows of the bank nearest to each picture.

    Args:
      images: see `embed`.
      k: how many, at most N.

    Returns:
      (similarity [B, k] float32, row [B, k] int32), most similar first.

    Raises:
      errors.UserError: see `embed`; or there is no bank, or k is out of range.
    """
    if self.bank is None:
      raise errors.UserError(f"'{self.workdir}' has weights but no bank: train on it first")
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= len(self.bank):
      raise errors.UserError(f'k is {k}, must be from 1 to the {len(self.bank)} rows of the bank')
    similarity, row = knn.nearest(self.embed(images), self.bank, k=k)
    return np.asarray(similarity), np.asarray(row)

  def classify(self, images):
    """Weighted kNN (Section 3.4) with the K and τ of the run.

    Args:
      images: see `embed`.

    Returns:
      [B] int, class numbers; `class_names` has their names.

    Raises:
      errors.UserError: see `neighbors`; or the data have no labels.
    """
    if self.labels is None:
      raise errors.UserError(f'{self.dataset.name} has no labels to classify by')
    similarity, row = self.neighbors(images, min(self.config.knn.neighbors, len(self.bank)))
    scores = knn.vote(similarity, self.labels[row], self.config.knn.temperature,
                      int(self.labels.max()) + 1)
    return np.argmax(scores, axis=1)

  def rows_of(self, source, sizes):
    """The bank's row of each picture of a folder that the run was trained on.

    It is one if it has a name and a size that the run knows, and lies in the run's own folder or is
    byte for byte the picture there.

    Args:
      source: `data.Pictures` of a folder.
      sizes: {path: size in bytes}.

    Returns:
      [n] int32, -1 where it has none.
    """
    listing = folder.read(self.workdir)
    if listing is None or self.bank is None:
      return np.full(len(source), -1, np.int32)
    rows = folder.rows_of(listing, source.names, sizes)
    own = folder.Files(os.path.expanduser(self.config.dataset.name.partition(':')[2]), source.names)
    if os.path.realpath(own.root) != os.path.realpath(source.files.root):
      for i in np.flatnonzero(rows >= 0):
        try:
          same = own[i] == source.files[i]
        except OSError:
          same = False
        rows[i] = rows[i] if same else -1
    return rows

  def digest(self):
    """SHA-256 of the weights."""
    return report.digest(jax.tree.leaves(self.variables))


def _read_views(chunk, *, source, side, size):
  """[H, W, 3] uint8 of each picture of a chunk; for threads and worker processes."""
  return [_read_view(i, source, side)
          for i in range(chunk * size, min((chunk + 1) * size, len(source)))]


def _read_view(i, source, side):
  try:
    return _view(source.files[i], source.name(i), side)
  except OSError as e:
    raise Unreadable(f"{source.name(i)} can't be read ({e.strerror})") from e


def _check_one_size(views, side, names):
  """Pictures that are not cut to one size must come in one."""
  for view, name in zip(views, names):
    if side is None and view.shape != views[0].shape:
      (height, width), (first_height, first_width) = view.shape[:2], views[0].shape[:2]
      raise errors.UserError(
          f'{name} has {height} x {width} pixels, must have {first_height} x {first_width} like '
          f'{names[0]}: this run was not trained to cut pictures to one size (set '
          '--config.augment.size, and with it --config.dataset.path=stream, in a new --workdir)')


def _view(image, name, side):
  """[H, W, 3] uint8 of one picture, as the encoder gets it; of a `side` unless that is None."""
  if isinstance(image, (str, os.PathLike)):
    name = f"'{image}'"
    try:
      image = pathlib.Path(image).read_bytes()
    except (OSError, ValueError) as e:
      raise Unreadable(f"{name} can't be read ({getattr(e, 'strerror', None) or e})") from e
  elif not isinstance(image, np.ndarray) and hasattr(image, '__array__'):
    image = np.asarray(image)
  if isinstance(image, np.ndarray) and (
      image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape):
    raise errors.UserError(f'{name} is {image.dtype} {list(image.shape)}, must be uint8 '
                           '[H, W, 3]')
  if not isinstance(image, (np.ndarray, bytes)):
    raise errors.UserError(f'{name} is a {type(image).__name__}, must be a uint8 array '
                           '[H, W, 3] or a path')
  try:
    if side is None:
      return decode.decode(image)
    return decode.view(image, functools.partial(decode.centre_box, side=side), side)
  except decode.UnreadableError as e:
    raise Unreadable(f'{name} {e}') from e
