"""Wrong inputs of every command, and what each says to them.

    python -m tests.wrong_inputs        writes docs/errors.md, which the tests compare
"""

from collections.abc import Callable
import contextlib
import dataclasses
import io
import os
import pathlib
import re
import subprocess
import tempfile

import jax
import numpy as np
from PIL import Image

from instdisc_jax import convert, embed, evaluate, main, preview, reproduce, retrieve, workdir
from instdisc_jax.data import folder as folder_lib

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'errors.md'
_NUM_DEVICES = 8
_FOREIGN = re.compile(r'\(.*\): (?=set )')  # words of other libraries: they change with versions


@dataclasses.dataclass(frozen=True)
class Case:
  """One wrong input.

  Attributes:
    what: is wrong, in words.
    command: launch/local.sh, or a module of `instdisc_jax`.
    arguments: of the command; run in an empty folder.
    prepare: makes in that folder what the mistake needs; what it yields stays meanwhile.
    foreign: whether the message quotes another library.
  """
  what: str
  command: str
  arguments: list[str]
  prepare: Callable = lambda: contextlib.nullcontext()
  foreign: bool = False


def _setting(what, *settings, prepare=contextlib.nullcontext, foreign=False):
  """A case of `main` with the demo's config."""
  return Case(what, 'main', ['--config=digits.py', '--workdir=run',
                             *(f'--config.{s}' for s in settings)], prepare, foreign)


def _writes(name, content):
  def prepare():
    pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(name).write_text(content)
    return contextlib.nullcontext()
  return prepare


def _saves(**arrays):
  def prepare():
    np.savez('a.npz', **arrays)
    return contextlib.nullcontext()
  return prepare


def _claims(**changes):
  """A run folder that is in use, with another setting."""
  def prepare():
    config = _digits()
    config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in changes.items()})
    return workdir.claim('run', config, 'other pictures')
  return prepare


def _begun(**changes):
  """As `_claims`, but left again."""
  def prepare():
    with _claims(**changes)():
      return contextlib.nullcontext()
  return prepare


def _digits():
  scope = {}
  exec((ROOT / 'configs' / 'digits.py').read_text(), scope)
  return scope['get_config']()


def _in_use():
  """A run folder in use, by a process and a machine that are always called the same."""
  stack = contextlib.ExitStack()
  stack.enter_context(_claims()())
  pathlib.Path('run/lock').write_text('process 4711 on node1\n')
  return stack


def _damaged():
  _writes('run/checkpoints/40/_METADATA', '')()
  return contextlib.nullcontext()


def _folder(*names, **texts):
  """A folder of tiny pictures; `texts` are further files, their names' underscores being dots."""
  def prepare():
    for name in names:
      path = pathlib.Path('pictures', name)
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (40, 30)).save(path)
    for name, text in texts.items():
      pathlib.Path('pictures', name.replace('_', '.')).write_text(text)
    return contextlib.nullcontext()
  return prepare


def _sizes():
  _folder('a/1.png', 'a/2.png', 'a/3.png', 'a/4.png', 'a/5.png', 'a/6.png', 'a/7.png')()
  Image.new('RGB', (30, 30)).save('pictures/a/8.png')
  return contextlib.nullcontext()


def _listed():
  """A folder of pictures that has one more than the run knows, and one less."""
  _folder('a/1.png', 'a/3.png')()
  size = pathlib.Path('pictures/a/1.png').stat().st_size
  pathlib.Path('run').mkdir()
  files = {'a/1.png': size, 'a/2.png': size}
  folder_lib.keep({'files': files, 'unreadable': {}}, list(files), 'run')
  return contextlib.nullcontext()


_PICTURES = np.zeros((16, 32, 32, 3), np.uint8)
_ARRAYS = 'dataset.name=arrays:a.npz'
_FOLDER = 'dataset.name=folder:pictures'

CASES = [
    Case('no workdir', 'main', ['--config=digits.py']),
    Case('no config', 'main', ['--workdir=run']),
    Case('no such config file', 'main', ['--config=none.py', '--workdir=run']),
    Case('config file with a syntax error', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'def ('), foreign=True),
    Case('config file without get_config', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'x = 1'), foreign=True),
    Case('config file that fails', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'def get_config(): return 1 / 0')),
    Case('config file that returns something else', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'def get_config(): return 3')),
    Case('unknown argument', 'main', ['--config=digits.py', '--workdir=run', '--batch=3']),
    Case('coordinator without the rest', 'main',
         ['--config=digits.py', '--workdir=run', '--coordinator=host:1234']),
    Case('process number out of range', 'main',
         ['--config=digits.py', '--workdir=run', '--coordinator=host:1234', '--num_processes=2',
          '--process_id=2']),
    Case('process count that is no number', 'main',
         ['--config=digits.py', '--workdir=run', '--num_processes=two']),
    _setting('misspelt setting', 'loss.temprature=0.1'),
    _setting('word for a number', 'batch_size=many'),
    _setting('seed below 0', 'seed=-1'),
    _setting('no epochs', 'epochs=0'),
    _setting('more images a batch than there are', 'batch_size=1304'),
    _setting('batch that the devices cannot share', 'batch_size=100'),
    _setting('batch that cannot be cut into parts', 'batch_size=128', 'accumulate_steps=3'),
    _setting('unknown encoder', 'model.name=resnet19'),
    _setting('no channels', 'model.width=0'),
    _setting('unknown type', 'model.dtype=int8'),
    _setting('float64 that JAX has not been asked for', 'model.dtype=float64'),
    _setting('encoder for larger pictures', 'model.name=alexnet'),
    _setting('unknown loss', 'loss.name=triplet'),
    _setting('temperature below 0', 'loss.temperature=-1'),
    _setting('temperature that is no number', 'loss.temperature=nan'),
    _setting('no noise', 'loss.name=nce', 'loss.noise_count=0'),
    _setting('normalizer below 0', 'loss.name=nce', 'loss.normalizer=-3'),
    _setting('proximal weight below 0', 'loss.proximal_weight=-1'),
    _setting('bank momentum above 1', 'bank.momentum=1.5'),
    _setting('bank of an unknown type', 'bank.dtype=float16'),
    _setting('unknown start of the bank', 'bank.init=zeros'),
    _setting('learning rate 0', 'optimizer.learning_rate=0'),
    _setting('momentum 1', 'optimizer.momentum=1'),
    _setting('unknown schedule', 'optimizer.schedule=step'),
    _setting('warm-up longer than the run', 'optimizer.schedule=cosine', 'epochs=5',
             'optimizer.warmup_epochs=5'),
    _setting('milestone at the start', 'optimizer.milestones=(0,)'),
    _setting('crop larger than the picture', 'augment.crop_scale=(0.5,2.0)'),
    _setting('hue beyond the circle', 'augment.hue=0.7'),
    _setting('pictures divided by 0', 'augment.std=(0.0,0.0,0.0)'),
    _setting('more neighbours than images', 'knn.neighbors=1298'),
    _setting('kNN temperature that overflows', 'knn.temperature=0.001'),
    _setting('checkpoint every 0 steps', 'checkpoint.every_steps=0'),
    _setting('unknown data set', 'dataset.name=mnist'),
    _setting('subset larger than the set', 'dataset.limit=9999'),
    _setting('subset of one image', 'dataset.limit=1'),
    _setting('folder for TFDS that is none', 'dataset.name=tfds:cifar10',
             'dataset.data_dir=nowhere'),
    _setting('data set that TFDS does not know', 'dataset.name=tfds:nothing_of_this_name',
             'dataset.data_dir=.', foreign=True),
    _setting('no such arrays', 'dataset.name=arrays:none.npz'),
    _setting('arrays that are text', _ARRAYS, prepare=_writes('a.npz', 'text'), foreign=True),
    _setting('arrays that hold Python objects', _ARRAYS,
             prepare=_saves(images=np.array([{}, {}], object)), foreign=True),
    _setting('arrays without images', _ARRAYS, prepare=_saves(pictures=_PICTURES)),
    _setting('images as floats', _ARRAYS, prepare=_saves(images=_PICTURES.astype(np.float32))),
    _setting('images without colours', _ARRAYS, prepare=_saves(images=_PICTURES[..., 0])),
    _setting('a label too few', _ARRAYS, prepare=_saves(images=_PICTURES, labels=np.arange(15))),
    _setting('label below 0', _ARRAYS, prepare=_saves(images=_PICTURES, labels=np.arange(16) - 1)),
    _setting('one image', _ARRAYS, prepare=_saves(images=_PICTURES[:1])),
    _setting('no such folder', _FOLDER),
    _setting('folder without pictures', _FOLDER, prepare=_writes('pictures/notes.txt', '')),
    _setting('folder of one picture', _FOLDER, prepare=_folder('1.png')),
    _setting('folder of which no file can be read', _FOLDER, 'dataset.on_unreadable=skip',
             prepare=_writes('pictures/1.jpg', 'text')),
    _setting('folder that has changed since', _FOLDER, prepare=_listed),
    _setting('listing of a folder that is broken', _FOLDER,
             prepare=lambda: [_folder('1.png')(), _writes('run/files.json', '[]')()][1]),
    _setting('label list without a picture', _FOLDER,
             prepare=_folder('1.png', '2.png', labels_csv='1.png,cat\n')),
    _setting('label list of three columns', _FOLDER,
             prepare=_folder('1.png', labels_csv='1.png,cat,red\n')),
    _setting('validation that is no share', 'dataset.validation=val'),
    _setting('validation folder that is missing', _FOLDER, 'dataset.validation=val',
             prepare=_folder('a/1.png', 'a/2.png')),
    _setting('validation with a class of its own', _FOLDER, 'dataset.validation=pictures/a',
             prepare=_folder('a/b/1.png', 'a/c/2.png')),
    _setting('pictures of several sizes on the device', _FOLDER, 'dataset.path=resident',
             'batch_size=8', 'knn.neighbors=1', prepare=_sizes),
    _setting('unknown data path', 'dataset.path=disk'),
    _setting('unknown answer to unreadable files', 'dataset.on_unreadable=ignore'),
    _setting('workers below 0', 'dataset.workers=-1'),
    _setting('views of 4 pixels', 'augment.size=4'),
    _setting('pictures that are not square, streamed as they are', _ARRAYS, 'dataset.path=stream',
             'batch_size=8', prepare=_saves(images=_PICTURES[:, :20])),
    _setting('weights that are missing', 'model.init=none.pth'),
    _setting('start from a folder that is no run', 'model.init=.'),
    Case('unknown preset', 'main', ['--config=imagenet.py:resnet19', '--workdir=run'],
         _writes('imagenet.py', (ROOT / 'configs' / 'imagenet.py').read_text())),
    Case('preview of no folder', 'preview', ['--images=pictures', '--output=a.png']),
    Case('preview into another format', 'preview', ['--images=pictures', '--output=a.jpg']),
    Case('preview of a broken picture', 'preview', ['--images=pictures', '--output=a.png'],
         _writes('pictures/1.jpg', 'text')),
    Case('preview into a missing folder', 'preview', ['--images=pictures', '--output=b/a.png'],
         _folder('1.png')),
    _setting('workdir below a file', prepare=_writes('run', '')),
    _setting('workdir in use', prepare=_in_use),
    _setting('workdir of a run with other settings', prepare=_begun(model__width=32)),
    _setting('workdir of a run on other data', prepare=_begun()),
    _setting('workdir with another config.json', prepare=_writes('run/config.json', '[]')),
    _setting('workdir whose every checkpoint is damaged', prepare=_damaged),
    Case('nothing to convert', 'convert', ['--workdir=run']),
    Case('conversion both ways', 'convert', ['--from=a.pth', '--to=b.pth', '--workdir=run']),
    Case('conversion without a workdir', 'convert', ['--from=a.pth']),
    Case('no such checkpoint', 'convert', ['--from=a.pth', '--workdir=run']),
    Case('conversion into a folder in use', 'convert', ['--from=a.pth', '--workdir=run'],
         lambda: [_writes('a.pth', '')(), _writes('run/notes.txt', '')()][1]),
    Case('export to an unknown format', 'convert', ['--workdir=run', '--to=a.onnx']),
    Case('export of no run', 'convert', ['--workdir=run', '--to=a.pth']),
    Case('export of a run without a checkpoint', 'convert', ['--workdir=run', '--to=a.pth'],
         _begun()),
    Case('evaluation of no run', 'evaluate', ['--workdir=run', '--protocol=knn']),
    Case('unknown protocol', 'evaluate', ['--workdir=run', '--protocol=knn,tsne']),
    Case('evaluation without a protocol', 'evaluate', ['--workdir=run']),
    Case('embedding with no run', 'embed',
         ['--workdir=run', '--images=pictures', '--output=a.npz']),
    Case('embedding into another format', 'embed',
         ['--workdir=run', '--images=pictures', '--output=a.csv']),
    Case('embedding into a missing folder', 'embed',
         ['--workdir=run', '--images=pictures', '--output=b/a.npz']),
    Case('page of no run', 'retrieve', ['--workdir=run', '--output=page']),
    Case('page in the place of something else', 'retrieve', ['--workdir=run', '--output=notes'],
         _writes('notes/todo.txt', '')),
    Case('page in a missing folder', 'retrieve', ['--workdir=run', '--output=b/page']),
    Case('page without queries', 'retrieve',
         ['--workdir=run', '--output=page', '--queries=0']),
    Case('unknown table', 'reproduce', ['--table=imagenet', '--scale=smoke']),
    Case('table without seeds', 'reproduce', ['--table=proximal', '--scale=smoke', '--seeds=0']),
    Case('processes in words', 'launch/local.sh', ['--processes=two', '--', '--workdir=run']),
    Case('nothing to launch', 'launch/local.sh', ['--devices=2']),
    Case('unknown argument', 'launch/local.sh', ['--hosts=3', '--', '--workdir=run']),
    Case('no interpreter', 'launch/local.sh', ['--', '--workdir=run'],
         lambda: _environment(PYTHON='no-python')),
]


@contextlib.contextmanager
def _environment(**variables):
  before = dict(os.environ)
  os.environ.update(variables)
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)


def answer(case):
  """(exit code, what it says) of a case, in a folder of its own."""
  errors = io.StringIO()
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.enter_context(contextlib.chdir(folder))
    pathlib.Path('digits.py').write_text((ROOT / 'configs' / 'digits.py').read_text())
    stack.enter_context(case.prepare())
    before, run_is_new = _listing(), not os.path.lexists('run')
    if case.command == 'launch/local.sh':
      done = subprocess.run([ROOT / case.command, *case.arguments], capture_output=True, text=True,
                            check=False)
      code, text = done.returncode, done.stderr
    else:
      module = {'main': main, 'convert': convert, 'preview': preview, 'embed': embed,
                'evaluate': evaluate, 'retrieve': retrieve, 'reproduce': reproduce}[case.command]
      with contextlib.redirect_stderr(errors):
        code = module.main(case.arguments)
      text = errors.getvalue()
    assert before.items() <= _listing().items(), f'{case.what}: files were changed or deleted'
    assert not (run_is_new and os.path.lexists('run')), f'{case.what}: a workdir was made'
    text = text.replace(f'{pathlib.Path.cwd()}/', '')
  return code, _FOREIGN.sub('(…): ', text) if case.foreign else text


def _listing():
  """{path: content} of the files here; config.json may be written again."""
  return {str(path): path.read_bytes() for path in pathlib.Path().rglob('*')
          if path.is_file() and path.name not in ('config.json', 'lock')}


def row(case, code, text):
  """A line of the table."""
  left_out = '--config=digits.py', '--workdir=run'
  command = ' '.join([case.command, *(a for a in case.arguments if a not in left_out)])
  cells = [case.what, f'`{command}`', str(code), text.strip()]
  return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'


def page():
  """docs/errors.md."""
  return f'''# Wrong inputs, and what is said to them

Written by `python -m tests.wrong_inputs`, on {_NUM_DEVICES} devices; the tests compare it with
what the commands say. Exit code 2 is a mistake in what was asked for, 1 a run that failed, and 75
one that a signal stopped after it had saved. Each message is one line on stderr. None of these
inputs changes or deletes a file. `--config=digits.py --workdir=run` is left out below.

| what is wrong | command | exit | message |
|---|---|---|---|
''' + '\n'.join(row(case, *answer(case)) for case in CASES) + '\n'


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', _NUM_DEVICES)
  PAGE.parent.mkdir(exist_ok=True)
  PAGE.write_text(page())
