"""Embeds a folder of pictures with a trained encoder; killed, it goes on where it was."""

import argparse
import json
import logging
import os
import pathlib
import shutil
import sys

import numpy as np

from instdisc_jax import checkpoint, errors, inference, preemption
from instdisc_jax.data import folder, pictures

_PART = 16  # chunks of pictures to a part, which is what a kill may lose


def embed(model, images, output, watch, on_unreadable='error'):
  """Writes the embeddings of all pictures of a folder.

  Until it is complete the parts lie in a folder beside the file; run again with the same weights
  and pictures, it makes those that are missing.

  Args:
    model: `inference.Model`.
    images: a folder.
    output: the .npz to write: 'path' [n] str, 'embedding' [n, D] float32 unit-norm, 'index' [n]
      int32, the bank's row of a picture that the run was trained on, else -1.
    watch: a `preemption.Watch`.
    on_unreadable: see `folder.load`.

  Raises:
    errors.UserError: no pictures, one that can't be read, or a place that can't be written.
    errors.Stopped: a signal came; what was done is kept.
  """
  source, _, listing = folder.load(images, on_unreadable, setting='set --images=FOLDER')
  output = pathlib.Path(output)
  parts = output.with_name(output.name + '.partial')
  try:
    done = _continue(parts, {'weights': model.digest(), 'pictures': source.identity()})
    size = inference.CHUNK * _PART
    with pictures.progress('embedding') as progress:
      task = progress.add_task('embedding', total=len(source), completed=min(done * size,
                                                                             len(source)))
      waiting = []
      for chunk in model.embed_all(source, done * _PART):
        waiting.append(chunk)
        progress.advance(task, len(chunk))
        if len(waiting) == _PART:
          done = _write_part(parts, done, waiting)
        watch.check()
      if waiting:
        done = _write_part(parts, done, waiting)
    embedding = np.concatenate([np.load(parts / f'{i}.npy') for i in range(done)])
    partial = parts / 'whole.npz'
    np.savez(partial, path=np.array(source.names), embedding=embedding,
             index=model.rows_of(source, listing['files']))
    os.replace(partial, output)
    shutil.rmtree(parts)
  except OSError as e:
    if errors.is_no_space(e):
      raise
    raise errors.UserError(f"'{output}' can't be written ({e.strerror}): set --output to a place "
                           'that can') from e
  return len(source)


def _continue(parts, identity):
  """How many parts are there already, of the same weights and pictures."""
  file = parts / 'identity.json'
  try:
    same = json.loads(file.read_text()) == identity
  except (OSError, ValueError):
    same = False
  if not same and parts.exists() and any(parts.iterdir()) and not file.exists():
    raise errors.UserError(f"'{parts}' is in the way, and not of this command: move it, or set "
                           '--output to another place')
  if not same:
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    file.write_text(json.dumps(identity))
  done = 0
  while (parts / f'{done}.npy').exists():
    done += 1
  return done


def _write_part(parts, number, chunks):
  """Writes and empties `chunks`; returns the number of the next part."""
  partial = parts / 'part.partial.npy'
  np.save(partial, np.concatenate(chunks))
  os.replace(partial, parts / f'{number}.npy')
  chunks.clear()
  return number + 1


def main(argv=None):
  """The command; returns its exit code: 0, 2 (a user's mistake), 1 (failed), 75 (stopped)."""
  def command():
    parser = argparse.ArgumentParser(
        prog='python -m instdisc_jax.embed', description=__doc__, allow_abbrev=False,
        usage='%(prog)s --workdir=DIR --images=FOLDER --output=FILE.npz [--on_unreadable=skip]')
    parser.error = lambda message: errors.raise_user_error(f'{message}: see --help')
    parser.add_argument('--workdir', required=True, metavar='DIR',
                        help='of a run, or made by instdisc_jax.convert')
    parser.add_argument('--images', required=True, metavar='FOLDER', help='pictures of any size')
    parser.add_argument('--output', required=True, metavar='FILE.npz',
                        help='what is written: the arrays path, embedding and index')
    parser.add_argument('--on_unreadable', choices=('error', 'skip'), default='error',
                        help='what becomes of files that give no picture')
    args = parser.parse_args(argv)
    output = pathlib.Path(args.output)
    errors.check_place(output, '.npz')
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax reports all it does
    checkpoint.leave_errors_to_orbax()
    with preemption.Watch() as watch:
      count = embed(inference.load(args.workdir), args.images, output, watch, args.on_unreadable)
    print(f'{output}: {count} embeddings')

  return errors.exit_code(command)


if __name__ == '__main__':
  sys.exit(main())
