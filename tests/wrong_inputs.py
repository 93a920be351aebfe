"""Wrong inputs of every command, and the message for each.

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

from instdisc_jax import (
    audit,
    classify,
    convert,
    embed,
    evaluate,
    main,
    preview,
    reproduce,
    retrieve,
)
from instdisc_jax import compile as compile_lib
from instdisc_jax import config as config_lib
from instdisc_jax.data import folder as folder_lib
from instdisc_jax.runtime import workdir

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / 'docs' / 'errors.md'
_NUM_DEVICES = 8
_FOREIGN = re.compile(r'\(.*\): (?=set |correct )')  # other libraries' words change with versions


@dataclasses.dataclass(frozen=True)
class Case:
  """One wrong input.

  Attributes:
    what: the mistake, in words.
    command: launch/local.sh, or a module of `instdisc_jax`.
    arguments: of the command; it is run in an empty folder.
    prepare: makes in that folder what the mistake needs; what it yields lasts meanwhile.
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


def _labels(text):
  def prepare():
    pathlib.Path('images').mkdir()
    for name in 'ab':
      Image.new('RGB', (8, 8)).save(f'images/{name}.png')
    pathlib.Path('l.csv').write_text(text)
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
    settings = config_lib.to_json(config)
    return workdir.claim('run', settings, config_lib.changeable(settings), 'other images')
  return prepare


def _started(**changes):
  """As `_claims`, but no longer in use."""
  def prepare():
    with _claims(**changes)():
      return contextlib.nullcontext()
  return prepare


def _digits():
  scope = {}
  exec((ROOT / 'configs' / 'digits.py').read_text(), scope)
  return scope['get_config']()


def _in_use():
  """A run folder in use, by a process and a machine whose names never change."""
  stack = contextlib.ExitStack()
  stack.enter_context(_claims()())
  pathlib.Path('run/lock').write_text('process 4711 on node1\n')
  return stack


def _damaged():
  _writes('run/checkpoints/40/_METADATA', '')()
  return contextlib.nullcontext()


def _folder(*names, **texts):
  """A folder of tiny images; `texts` are further files, underscores in their names being dots."""
  def prepare():
    for name in names:
      path = pathlib.Path('images', name)
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new('RGB', (40, 30)).save(path)
    for name, text in texts.items():
      pathlib.Path('images', name.replace('_', '.')).write_text(text)
    return contextlib.nullcontext()
  return prepare


def _sizes():
  _folder('a/1.png', 'a/2.png', 'a/3.png', 'a/4.png', 'a/5.png', 'a/6.png', 'a/7.png')()
  Image.new('RGB', (30, 30)).save('images/a/8.png')
  return contextlib.nullcontext()


def _listed():
  """A folder of images with one that the run does not know, and without one that it does."""
  _folder('a/1.png', 'a/3.png')()
  size = pathlib.Path('images/a/1.png').stat().st_size
  pathlib.Path('run').mkdir()
  files = {'a/1.png': size, 'a/2.png': size}
  folder_lib.keep({'files': files, 'unreadable': {}}, list(files), 'run')
  return contextlib.nullcontext()


_IMAGES = np.zeros((16, 32, 32, 3), np.uint8)
_ARRAYS = 'dataset.name=arrays:a.npz'
_FOLDER = 'dataset.name=folder:images'

CASES = [
    Case('no workdir', 'main', ['--config=digits.py']),
    Case('no config', 'main', ['--workdir=run']),
    Case('missing config file', 'main', ['--config=none.py', '--workdir=run']),
    Case('config file with a syntax error', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'def ('), foreign=True),
    Case('config file without get_config', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'x = 1')),
    Case('config file that raises an error', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'def get_config(): return 1 / 0')),
    Case('config file that returns something else', 'main', ['--config=c.py', '--workdir=run'],
         _writes('c.py', 'def get_config(): return 3')),
    Case('unknown argument', 'main', ['--config=digits.py', '--workdir=run', '--batch=3']),
    Case('coordinator without the rest', 'main',
         ['--config=digits.py', '--workdir=run', '--coordinator=host:1234']),
    Case('process number out of range', 'main',
         ['--config=digits.py', '--workdir=run', '--coordinator=host:1234', '--num_processes=2',
          '--process_id=2']),
    Case('number of processes in words', 'main',
         ['--config=digits.py', '--workdir=run', '--num_processes=two']),
    _setting('misspelled setting', 'loss.temprature=0.1'),
    _setting('word instead of a number', 'batch_size=many'),
    _setting('word instead of true or false', 'deterministic=perhaps'),
    _setting('word instead of numbers in parentheses', 'optimizer.milestones=late'),
    _setting('seed below 0', 'seed=-1'),
    _setting('unknown tracker', 'tracker=mlflow'),
    _setting('0 epochs', 'epochs=0'),
    _setting('batch larger than the data set', 'batch_size=1304'),
    _setting('batch size not divisible by the number of devices', 'batch_size=100'),
    _setting('batch size not divisible into parts', 'batch_size=128', 'accumulate_steps=3'),
    _setting('unknown encoder', 'model.name=resnet19'),
    _setting('0 channels', 'model.width=0'),
    _setting('unknown type of the computation', 'model.dtype=int8'),
    _setting('float64 that is not enabled in JAX', 'model.dtype=float64'),
    _setting('encoder for larger images', 'model.name=alexnet'),
    _setting('unknown loss', 'loss.name=contrastive'),
    _setting('temperature below 0', 'loss.temperature=-1'),
    _setting('temperature that is not a number', 'loss.temperature=nan'),
    _setting('0 noise samples', 'loss.name=nce', 'loss.noise_count=0'),
    _setting('normalizer below 0', 'loss.name=nce', 'loss.normalizer=-3'),
    _setting('three views', 'loss.views=3'),
    _setting('two views of a sampled loss', 'loss.name=nce', 'loss.views=2'),
    _setting('as many neighbors as images', 'loss.neighbors=1297'),
    _setting('neighbors from the end of the run on', 'loss.neighbors=3',
             'loss.neighbors_from_epoch=200', 'epochs=200'),
    _setting('views that are no whole patches', 'model.name=vit_s14', 'augment.size=32'),
    _setting('unknown negatives', 'loss.name=triplet', 'loss.mining=easy'),
    _setting('unknown head', 'model.head=deep'),
    _setting('unknown optimizer', 'optimizer.name=lars'),
    _setting('AdamW for class weights', 'optimizer.name=adamw', 'loss.name=parametric_softmax'),
    _setting('proximal weight below 0', 'loss.proximal_weight=-1'),
    _setting('bank momentum above 1', 'bank.momentum=1.5'),
    _setting('bank of an unknown type', 'bank.dtype=int8'),
    _setting('kernel that does not exist', 'loss.kernel=triton'),
    _setting('kernel of another platform', 'loss.kernel=cudnn'),
    _setting('unknown initialization of the bank', 'bank.init=zeros'),
    _setting('learning rate of 0', 'optimizer.learning_rate=0'),
    _setting('momentum of 1', 'optimizer.momentum=1'),
    _setting('unknown schedule', 'optimizer.schedule=step'),
    _setting('warm-up longer than the run', 'optimizer.schedule=cosine', 'epochs=5',
             'optimizer.warmup_epochs=5'),
    _setting('milestone at the start', 'optimizer.milestones=(0,)'),
    _setting('crop larger than the image', 'augment.crop_scale=(0.5,2.0)'),
    _setting('hue shift of more than half a turn', 'augment.hue=0.7'),
    _setting('standard deviation of 0', 'augment.std=(0.0,0.0,0.0)'),
    _setting('more neighbors than images', 'knn.neighbors=1298'),
    _setting('kNN temperature that overflows', 'knn.temperature=0.001'),
    _setting('checkpoint every 0 steps', 'checkpoint.every_steps=0'),
    _setting('unknown data set', 'dataset.name=mnist'),
    _setting('subset larger than the set', 'dataset.limit=9999'),
    _setting('subset of one image', 'dataset.limit=1'),
    _setting('missing folder for TFDS', 'dataset.name=tfds:cifar10',
             'dataset.data_dir=nowhere'),
    _setting('data set unknown to TFDS', 'dataset.name=tfds:nothing_of_this_name',
             'dataset.data_dir=.', foreign=True),
    _setting('missing .npz file', 'dataset.name=arrays:none.npz'),
    _setting('.npz file that is text', _ARRAYS, prepare=_writes('a.npz', 'text'), foreign=True),
    _setting('.npz file with Python objects', _ARRAYS,
             prepare=_saves(images=np.array([{}, {}], object)), foreign=True),
    _setting('.npz file without images', _ARRAYS, prepare=_saves(pictures=_IMAGES)),
    _setting('images as floats', _ARRAYS, prepare=_saves(images=_IMAGES.astype(np.float32))),
    _setting('images without color channels', _ARRAYS, prepare=_saves(images=_IMAGES[..., 0])),
    _setting('one label missing', _ARRAYS, prepare=_saves(images=_IMAGES, labels=np.arange(15))),
    _setting('label below 0', _ARRAYS, prepare=_saves(images=_IMAGES, labels=np.arange(16) - 1)),
    _setting('.npz file with a single image', _ARRAYS, prepare=_saves(images=_IMAGES[:1])),
    _setting('missing folder', _FOLDER),
    _setting('folder without images', _FOLDER, prepare=_writes('images/notes.txt', '')),
    _setting('folder with a single image', _FOLDER, prepare=_folder('1.png')),
    _setting('folder without a readable image', _FOLDER, 'dataset.on_unreadable=skip',
             prepare=_writes('images/1.jpg', 'text')),
    _setting('folder that has changed since the run was started', _FOLDER, prepare=_listed),
    _setting('damaged listing of a folder', _FOLDER,
             prepare=lambda: [_folder('1.png')(), _writes('run/files.json', '[]')()][1]),
    _setting('labels.csv with three columns', _FOLDER,
             prepare=_folder('1.png', labels_csv='1.png,cat,red\n')),
    _setting('labels.csv with two labels for one image', _FOLDER,
             prepare=_folder('1.png', labels_csv='1.png,cat\n1.png,dog\n')),
    _setting('labels.csv without a label', _FOLDER,
             prepare=_folder('1.png', labels_csv='1.png,\n')),
    _setting('validation that is not a share', 'dataset.validation=val'),
    _setting('missing validation folder', _FOLDER, 'dataset.validation=val',
             prepare=_folder('a/1.png', 'a/2.png')),
    _setting('validation folder with an unknown class', _FOLDER, 'dataset.validation=images/a',
             prepare=_folder('a/b/1.png', 'a/c/2.png')),
    _setting('images of several sizes on the device', _FOLDER, 'dataset.path=resident',
             'batch_size=8', 'knn.neighbors=1', prepare=_sizes),
    _setting('unknown data path', 'dataset.path=disk'),
    _setting('unknown choice for unreadable files', 'dataset.on_unreadable=ignore'),
    _setting('negative number of workers', 'dataset.workers=-1'),
    _setting('views of 4 pixels', 'augment.size=4'),
    _setting('images that are not square, streamed without a crop', _ARRAYS, 'dataset.path=stream',
             'batch_size=8', prepare=_saves(images=_IMAGES[:, :20])),
    _setting('missing file of weights', 'model.init=none.pth'),
    _setting('start from a folder that is not a run', 'model.init=.'),
    Case('unknown preset', 'main', ['--config=imagenet.py:resnet19', '--workdir=run'],
         _writes('imagenet.py', (ROOT / 'configs' / 'imagenet.py').read_text())),
    Case('preview of a missing folder', 'preview', ['--images=images', '--output=a.png']),
    Case('preview in another format', 'preview', ['--images=images', '--output=a.jpg']),
    Case('preview of a damaged image', 'preview', ['--images=images', '--output=a.png'],
         _writes('images/1.jpg', 'text')),
    Case('preview into a missing folder', 'preview', ['--images=images', '--output=b/a.png'],
         _folder('1.png')),
    _setting('workdir below a file', prepare=_writes('run', '')),
    _setting('workdir in use', prepare=_in_use),
    _setting('workdir of a run with other settings', prepare=_started(model__width=32)),
    _setting('workdir of a run on other data', prepare=_started()),
    _setting('workdir with another config.json', prepare=_writes('run/config.json', '[]')),
    _setting('workdir in which every checkpoint is damaged', prepare=_damaged),
    Case('nothing to convert', 'convert', ['--workdir=run']),
    Case('conversion in both directions', 'convert',
         ['--from=a.pth', '--to=b.pth', '--workdir=run']),
    Case('conversion without a workdir', 'convert', ['--from=a.pth']),
    Case('missing checkpoint', 'convert', ['--from=a.pth', '--workdir=run']),
    Case('conversion into a folder that is not empty', 'convert', ['--from=a.pth', '--workdir=run'],
         lambda: [_writes('a.pth', '')(), _writes('run/notes.txt', '')()][1]),
    Case('export to an unknown format', 'convert', ['--workdir=run', '--to=a.tflite']),
    Case('export of a folder that is not a run', 'convert', ['--workdir=run', '--to=a.pth']),
    Case('export of a run without a checkpoint', 'convert', ['--workdir=run', '--to=a.pth'],
         _started()),
    Case('evaluation of a folder that is not a run', 'evaluate',
         ['--workdir=run', '--protocol=knn']),
    Case('unknown protocol', 'evaluate', ['--workdir=run', '--protocol=knn,tsne']),
    Case('evaluation without a protocol', 'evaluate', ['--workdir=run']),
    Case('detection without images with boxes', 'evaluate',
         ['--workdir=run', '--protocol=detection']),
    Case('detection and another protocol', 'evaluate',
         ['--workdir=run', '--protocol=knn,detection', '--dataset=tfds:voc/2007']),
    Case('more than all labels', 'evaluate',
         ['--workdir=run', '--protocol=few_label', '--shares=0.1,2']),
    Case('embedding with a folder that is not a run', 'embed',
         ['--workdir=run', '--images=images', '--output=a.npz']),
    Case('embeddings in another format', 'embed',
         ['--workdir=run', '--images=images', '--output=a.csv']),
    Case('embeddings into a missing folder', 'embed',
         ['--workdir=run', '--images=images', '--output=b/a.npz']),
    Case('embeddings with predictions that are no file', 'embed',
         ['--workdir=run', '--images=images', '--output=a.npz', '--predictions=p.csv']),
    *(Case(f'labels: {what}', 'classify',
           ['--workdir=run', '--images=images', '--labels=l.csv', '--output=p.csv'],
           _labels(text))
      for what, text in (
          ('a path that is not an image', 'c.png,cat\n'),
          ('two for one image', 'a.png,cat\na.png,dog\n'),
          ('one class', 'a.png,cat\nb.png,cat\n'), ('an empty file', ''),
          ('a line without one', 'a.png\n'), ('an empty one', 'a.png,\n'))),
    Case('labels that are no file', 'classify',
         ['--workdir=run', '--images=images', '--labels=m.csv', '--output=p.csv'], _labels('')),
    Case('predictions of a folder that is not a run', 'classify',
         ['--workdir=run', '--images=images', '--labels=l.csv', '--output=p.csv'],
         _labels('a.png,cat\nb.png,dog\n')),
    Case('predictions into a file that exists', 'classify',
         ['--workdir=run', '--labels=l.csv', '--output=l.csv'], _labels('')),
    Case('predictions in another format', 'classify',
         ['--workdir=run', '--labels=l.csv', '--output=p.json']),
    Case('fewer than 0 suggestions', 'classify',
         ['--workdir=run', '--labels=l.csv', '--output=p.csv', '--suggest=-1']),
    Case('suggestions over others with labels', 'classify',
         ['--workdir=run', '--labels=l.csv', '--output=p.csv', '--suggest=1'],
         _writes('p-suggested.csv', 'path,label\n1.png,cat\n')),
    Case('an audit of a folder that is not a run', 'audit', ['--workdir=run', '--output=out']),
    Case('an audit into a folder with files', 'audit', ['--workdir=run', '--output=notes'],
         _writes('notes/todo.txt', '')),
    Case('a threshold that is no cosine', 'audit',
         ['--workdir=run', '--output=out', '--threshold=1.5']),
    Case('a threshold that is no number', 'audit',
         ['--workdir=run', '--output=out', '--threshold=high']),
    Case('a test set without images', 'audit', ['--workdir=run', '--output=out', '--test=images']),
    Case('page of a folder that is not a run', 'retrieve', ['--workdir=run', '--output=page']),
    Case('page in a folder with other files', 'retrieve', ['--workdir=run', '--output=notes'],
         _writes('notes/todo.txt', '')),
    Case('page in a missing folder', 'retrieve', ['--workdir=run', '--output=b/page']),
    Case('page with 0 queries', 'retrieve',
         ['--workdir=run', '--output=page', '--queries=0']),
    Case('page with predictions that are no file', 'retrieve',
         ['--workdir=run', '--output=page', '--predictions=p.csv']),
    Case('page with a table that is not one of predictions', 'retrieve',
         ['--workdir=run', '--output=page', '--predictions=p.csv'],
         _writes('p.csv', 'path,class\na.png,cat\n')),
    Case('unknown table', 'reproduce', ['--table=imagenet', '--scale=smoke']),
    Case('table with 0 seeds', 'reproduce', ['--table=proximal', '--scale=smoke', '--seeds=0']),
    Case('seeds of a table that has one run of each encoder', 'reproduce',
         ['--table=places', '--scale=smoke', '--seeds=3']),
    Case('table at a scale that it does not have', 'reproduce',
         ['--table=places', '--scale=small']),
    Case('unknown topology', 'compile', ['--config=digits.py', '--topology=v9:2x2']),
    Case('unknown program', 'compile',
         ['--config=digits.py', '--topology=cpu:8', '--program=stop']),
    Case('more rows than an index can number', 'compile',
         ['--config=digits.py', '--topology=cpu:8', '--config.dataset.name=fake:3000000000']),
    Case('compiled into another format', 'compile',
         ['--config=digits.py', '--topology=cpu:8', '--output=c.txt']),
    Case('number of processes in words', 'launch/local.sh',
         ['--processes=two', '--', '--workdir=run']),
    Case('unknown command to launch', 'launch/local.sh',
         ['--command=train', '--', '--workdir=run']),
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
  """(exit code, message) of a case, in a folder of its own."""
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
                'evaluate': evaluate, 'retrieve': retrieve, 'reproduce': reproduce,
                'classify': classify, 'audit': audit,
                'compile': compile_lib}[case.command]
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
  return f'''# Errors

Wrong inputs of every command, and the message for each: one line on stderr that names the value
found, the value required and the setting to change. None of these inputs changes or deletes a file.

Exit codes:

* `0` success
* `1` the run failed, for example because of a full disk or a non-finite loss
* `2` a mistake in the command, its settings or its data
* `75` stopped by a signal, after saving

`python -m tests.wrong_inputs` writes this page, on {_NUM_DEVICES} devices, and the tests compare it
with the messages. `--config=digits.py --workdir=run` is left out of the commands below.

| mistake | command | exit code | message |
|---|---|---|---|
''' + '\n'.join(row(case, *answer(case)) for case in CASES) + '\n'


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', _NUM_DEVICES)
  PAGE.parent.mkdir(exist_ok=True)
  PAGE.write_text(page())
