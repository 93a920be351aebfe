"""A folder of images, of any sizes and formats, with or without classes.

An image's class is its first subfolder; if any image is at the root, the set is unlabeled, unless
there is a `labels.csv` at the root with a line `path,label` for each image; with lines for some,
the set is unlabeled, too. The index of an image
is its place in the sorted list of paths. That list, with file sizes, is kept in the workdir, and a
folder that no longer matches it is an error: a row of the bank would correspond to another image.
"""

from collections.abc import Mapping, Sequence
import concurrent.futures
import csv
import dataclasses
import hashlib
import json
import os
from typing import Any

from jaxtyping import Int
import numpy as np

from instdisc_jax.data import decode
from instdisc_jax.data import images as images_lib
from instdisc_jax.runtime import errors, files, metrics

LISTING = 'files.json'
LABELS = 'labels.csv'
_SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff',
             '.ppm', '.pgm', '.pbm', '.avif')


@dataclasses.dataclass(frozen=True)
class Files:
  """files[i] is the content of the i-th file, as bytes."""
  root: str
  paths: list[str]

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, i):
    with open(os.path.join(self.root, self.paths[i]), 'rb') as file:
      return file.read()

  def size(self, i: int) -> int:
    """Bytes of the i-th file, which is not read."""
    return os.stat(os.path.join(self.root, self.paths[i])).st_size

  def stamp(self) -> str:
    """A digest of the files' location and modification times."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(self.root)))
    for name in self.paths:
      path = os.path.join(self.root, name)
      digest.update(str(os.stat(path).st_mtime_ns if os.path.exists(path) else None).encode())
    return digest.hexdigest()[:16]


def load(path: str, on_unreadable: str, workdir: str | os.PathLike[str] | None = None,
         setting: str = 'dataset.name', with_labels: bool = True, allow_added: bool = False
         ) -> tuple[images_lib.Images, tuple[str, ...] | None, dict[str, Any]]:
  """Reads the names and sizes of all images below a folder.

  Args:
    path: the folder.
    on_unreadable: with 'error', a file that cannot be decoded ends the run when it is reached; with
      'skip', all files are decoded once beforehand, and unreadable ones are left out.
    workdir: a folder that may hold the listing of an earlier run, or None.
    setting: the setting or argument that names the folder.
    with_labels: whether to read the classes.
    allow_added: whether to leave out, with a warning, images that an earlier run does not know.

  Returns:
    (`Images`, class names or None, listing): the listing is what `keep` writes.

  Raises:
    errors.UserError: the folder is missing, has no images or an invalid labels.csv, or has changed
      since the workdir was created.
  """
  remedy = f'set <{setting}>' + ('=folder:PATH' if setting == 'dataset.name' else '')
  root = os.path.abspath(os.path.expanduser(path))
  if not os.path.isdir(root):
    raise errors.UserError(f"no folder '{path}'", None, remedy, setting)
  try:
    found = scan(root)
  except OSError as e:
    raise errors.UserError(f"'{e.filename}' cannot be read ({e.strerror})", None,
                           f'{remedy} to a readable folder', setting) from e
  listing = None if workdir is None else read(workdir)
  if listing is not None:
    if allow_added:
      found = _known(root, found, listing, workdir)
    _check_unchanged(root, found, listing, workdir)
  if not found:
    raise errors.UserError(f"'{path}' has no images ({', '.join(_SUFFIXES)})", None,
                           f'{remedy} to a folder that has some', setting)
  if listing is None:
    unreadable = _find_unreadable(root, sorted(found)) if on_unreadable == 'skip' else {}
    listing = {'files': dict(sorted(found.items())), 'unreadable': unreadable}
    if len(unreadable) == len(found):
      name, why = next(iter(unreadable.items()))
      raise errors.UserError(
          f"none of the images in '{path}' can be read ({len(found)} found; '{name}' {why})", None,
          remedy, setting)
    if unreadable:
      name, why = next(iter(unreadable.items()))
      errors.warn(f'{len(unreadable)} of {len(found)} files are left out because they cannot be '
                  f"read as images; the first: '{name}' {why}")
  paths = [name for name in listing['files'] if name not in listing['unreadable']]
  labels, class_names = _classes(root, paths) if with_labels else (None, None)
  digest = hashlib.sha256()
  for name in paths:
    digest.update(f'{name}\0{found[name]}\n'.encode('utf8', 'surrogateescape'))
  images = images_lib.Images(
      Files(root, paths), labels, f'{len(paths)} files {digest.hexdigest()}', names=paths)
  return images, class_names, listing


def scan(root: str) -> dict[str, int]:
  """{path below the root, with '/': size in bytes} of all images; links are followed.

  Every folder is visited once: through a link only if it is not below the root itself, so loops
  terminate and no image has two indices. A dangling link has the size -1.
  """
  found, seen, folders, links = {}, set(), [''], []
  with metrics.progress_bar('scanning') as progress:
    task = progress.add_task('scanning')
    while folders or links:
      folder = folders.pop() if folders else links.pop(0)
      status = os.stat(os.path.join(root, folder))
      if (status.st_dev, status.st_ino) in seen:
        continue
      seen.add((status.st_dev, status.st_ino))
      with os.scandir(os.path.join(root, folder)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
          name = f'{folder}/{entry.name}' if folder else entry.name
          if entry.name.startswith('.'):
            continue
          if _is_folder(entry):
            (links if entry.is_symlink() else folders).append(name)
          elif entry.name.lower().endswith(_SUFFIXES):
            found[name] = entry.stat().st_size if os.path.exists(entry.path) else -1
      progress.update(task, completed=len(found))
  return found


def _is_folder(entry):
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def read(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """The listing kept in a workdir, or None.

  Returns:
    {'files': {path: size in bytes}, 'unreadable': {path: reason}, 'rows': [path]}, where 'rows'
    are the images of the bank's rows, in order.

  Raises:
    errors.UserError: it cannot be read or is invalid.
  """
  file = files.place(workdir) / LISTING
  try:
    listing = json.loads(file.read_text())
    return {'files': dict(listing['files']), 'unreadable': dict(listing['unreadable']),
            'rows': list(listing['rows'])}
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError) as e:
    fault = (f'cannot be read ({errors.reason(e)})' if isinstance(e, OSError)
             else 'is not a listing of images')
    raise errors.UserError(f"'{file}' {fault}", None, 'restore it, or set another <--workdir>',
                           '--workdir') from e


def keep(listing: dict[str, Any], rows: Sequence[str],
         workdir: str | os.PathLike[str]) -> None:
  """Writes the listing into a workdir that has none, and beside it the names of unreadable files.

  Args:
    listing: as `load` returns it.
    rows: the paths of the training images, in order.
    workdir: the run's workdir.
  """
  file = files.place(workdir) / LISTING
  if file.exists():
    return
  if listing['unreadable']:
    files.write(file.with_name('unreadable.txt'), ''.join(
        f'{name}: {why}\n' for name, why in listing['unreadable'].items()))
  files.write(file, json.dumps(listing | {'rows': rows}))


def rows_of(listing: Mapping[str, Any], names: Sequence[str],
            sizes: Mapping[str, int]) -> Int[np.ndarray, ' n']:
  """The bank row of each image in a run: [n] int32, -1 for an image without one.

  Args:
    listing: the run's listing, see `read`.
    names: [n] paths.
    sizes: {path: size in bytes}; a file of another size is another image.
  """
  row = {name: i for i, name in enumerate(listing['rows'])}
  known = lambda name: listing['files'].get(name) == sizes[name]
  return np.array([row.get(name, -1) if known(name) else -1 for name in names], np.int32)


def only_same(rows: Int[np.ndarray, ' n'], names: Sequence[str], root: str,
              other: str) -> Int[np.ndarray, ' n']:
  """`rows` with -1 for files that differ from those of the same names below another folder.

  Args:
    rows: [n] the bank row of each image in a run on the other folder, or -1.
    names: [n] paths.
    root: the folder of the images.
    other: the folder of the run.
  """
  mine, theirs = (Files(os.path.expanduser(place), list(names)) for place in (root, other))
  if os.path.realpath(mine.root) == os.path.realpath(theirs.root):
    return rows
  rows = rows.copy()
  for i in np.flatnonzero(rows >= 0):
    try:
      same = mine[i] == theirs[i]
    except OSError:
      same = False
    rows[i] = rows[i] if same else -1
  return rows


def _known(root, found, listing, workdir):
  """The files that an earlier run knows; warns of others."""
  added = sorted(found.keys() - listing['files'].keys())
  if added:
    errors.warn(f"'{root}' has images that '{workdir}' was trained without, which are left out: "
                f"{len(added)}, the first '{added[0]}'")
  return {name: size for name, size in found.items() if name in listing['files']}


def _check_unchanged(root, found, listing, workdir):
  known = listing['files']
  added, removed = sorted(found.keys() - known.keys()), sorted(known.keys() - found.keys())
  changed = sorted(name for name in found.keys() & known.keys() if found[name] != known[name])
  differences = [f"{len(names)} {what} (first: '{names[0]}')" for what, names in (
      ('added', added), ('removed', removed), ('changed in size', changed)) if names]
  if differences:
    raise errors.UserError(
        f"'{root}' has changed since '{workdir}' was started: {', '.join(differences)}; rows of "
        'the bank would correspond to other images', setting='dataset.name',
        remedy=f'restore the files, or set <model.init>={workdir} and a new <--workdir> to start '
               'from this run')


def _find_unreadable(root, names):
  """{path: reason} for the files that cannot be decoded."""
  files = Files(root, names)

  def fault(i):
    try:
      decode.decode(files[i])
    except (OSError, decode.UnreadableError) as e:
      return errors.reason(e)
    return None

  faults = {}
  with (concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        metrics.progress_bar('checking all images') as progress):
    for name, why in progress.track(zip(names, pool.map(fault, range(len(names)))), len(names)):
      if why is not None:
        faults[name] = why
  return faults


def _classes(root, paths):
  """(labels [N] int32, class names), or (None, None)."""
  file = os.path.join(root, LABELS)
  if os.path.exists(file):
    given = _read_labels(file)
    missing = [name for name in paths if name not in given]
    if missing:
      errors.warn(f"'{file}' has no line for {len(missing)} of the {len(paths)} images (first: "
                  f"'{missing[0]}'): the images count as unlabeled; instdisc_jax.classify labels "
                  'them all from those that are')
      return None, None
    names = [given[name] for name in paths]
  elif any('/' not in name for name in paths):
    return None, None
  else:
    names = [name.partition('/')[0] for name in paths]
  class_names = sorted(set(names))
  number = {name: i for i, name in enumerate(class_names)}
  return np.array([number[name] for name in names], np.int32), tuple(class_names)


def _read_labels(file):
  try:
    with open(file, newline='', encoding='utf-8-sig') as lines:
      rows = [row for row in csv.reader(lines) if row]
  except (OSError, ValueError, csv.Error) as e:
    raise errors.UserError(f"'{file}' cannot be read ({e})", None,
                           'write lines of path,label in UTF-8', 'dataset.name') from e
  wrong = next((row for row in rows if len(row) != 2), None)
  if wrong is not None:
    raise errors.UserError(f"'{','.join(wrong)}' in '{file}' has {len(wrong)} value"
                           + ('' if len(wrong) == 1 else 's'), 'path,label',
                           'correct it, or remove the file to train without labels',
                           'dataset.name')
  found = {}
  for name, label in ((name.strip(), label.strip()) for name, label in rows):
    if not label:
      raise errors.UserError(f"'{file}' has no label for '{name}'", 'path,label',
                             'add it, or remove the file to train without labels', 'dataset.name')
    if found.setdefault(name, label) != label:
      raise errors.UserError(f"'{file}' labels '{name}' as '{found[name]}' and '{label}'",
                             'one label for each image', 'remove one of the lines',
                             'dataset.name')
  return found
