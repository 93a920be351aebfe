"""Kills runs with SIGKILL at random moments, resumes them, and compares their results.

    python -m tests.soak_kill [--runs=20] [--kills=3] [--seed=0]

Each run is the demo at small size. It is killed up to `kills` times between its first and its last
step, about every second time while a checkpoint is being written, and then runs to its end. Its
parameters, bank, Z, losses, kNN accuracies and lines of metrics.jsonl must equal those of an
uninterrupted run, bit for bit; only times may differ. Exit code 0 if all do.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from instdisc_jax.runtime import metrics

ROOT = pathlib.Path(__file__).parents[1]
END = 60
_SETTINGS = ['dataset.limit=256', 'model.width=4', 'model.embedding_dim=16', 'batch_size=32',
             f'steps={END}', 'knn.neighbors=5', 'knn.every_epochs=3', 'log_every_steps=2',
             'checkpoint.every_steps=3', 'loss.noise_count=64']
_VARIANTS = {  # every loss, Z as a constant and as a moving average, the proximal term
    'softmax': ['loss.proximal_weight=1'],
    'nce': ['loss.name=nce', 'loss.normalizer=first_batch'],
    'nce ema': ['loss.name=nce', 'loss.normalizer=ema'],
    'sampled softmax': ['loss.name=sampled_softmax'],
    'parametric softmax': ['loss.name=parametric_softmax'],
}
_TIMES = ('wall_seconds', 'images_per_second', 'input_wait')


def command(workdir, *settings):
  """The small demo's command line."""
  return [sys.executable, '-m', 'instdisc_jax.main', '--config=configs/digits.py',
          f'--workdir={workdir}', *(f'--config.{s}' for s in [*_SETTINGS, *settings])]


def environment():
  """Two CPU devices; programs are optimized, and compiled once where a cache is shared."""
  return {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'} | {
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': '2'}


def start(workdir, *settings):
  """Starts the small demo; its output goes to workdir.log."""
  with open(f'{workdir}.log', 'a') as log:
    return subprocess.Popen(command(workdir, *settings), cwd=ROOT, env=environment(),
                            stdout=log, stderr=log)


def outcome(workdir):
  """What must be equal: the summary and all lines of metrics.jsonl, without times."""
  untimed = lambda d: {key: value for key, value in d.items() if key not in _TIMES}
  return (untimed(json.loads((workdir / 'summary.json').read_text())),
          [untimed(line) for line in metrics.read(workdir)])


def last_step(workdir):
  return max((line['step'] for line in metrics.read(workdir)), default=0)


def kill_once(workdir, settings, chance):
  """Kills a run at a random step; (step, whether in a save), or None if the run ended first."""
  process = start(workdir, *settings)
  first = last_step(workdir) + 1
  target, in_save = chance.randint(first, END - 1) if first < END else END, chance.random() < 0.5
  saving = lambda: any((workdir / 'checkpoints').glob('*.orbax-checkpoint-tmp*'))
  while process.poll() is None:
    if last_step(workdir) >= target and (not in_save or saving()):
      time.sleep(chance.random() * (0.005 if in_save else 0.02))
      process.kill()
      process.wait()
      return last_step(workdir), saving()
    time.sleep(0.001)
  if process.returncode != 0:
    raise RuntimeError(f'{workdir} ended by itself with {process.returncode}: '
                       + pathlib.Path(f'{workdir}.log').read_text()[-500:])
  return None


def one_run(folder, number, kills, seed, settings):
  """One run with its kills; (outcome, [(step, whether in a save)])."""
  chance = random.Random(f'{seed} {number}')
  workdir, moments = folder / f'run{number}', []
  for _ in range(chance.randint(1, kills)):
    moment = kill_once(workdir, settings, chance)
    if moment is None:
      break
    moments.append(moment)
  if start(workdir, *settings).wait() != 0:
    raise RuntimeError(pathlib.Path(f'{workdir}.log').read_text()[-500:])
  return outcome(workdir), moments


def soak(folder, runs, kills, seed):
  """Two runs at a time, with a line for each; returns (how many were equal, all moments)."""
  names = list(_VARIANTS)
  variant = lambda number: names[number % len(names)]
  uninterrupted = {}
  for name in names[:runs]:
    workdir = folder / name.replace(' ', '-')
    assert start(workdir, *_VARIANTS[name]).wait() == 0, f'see {workdir}.log'
    uninterrupted[name] = outcome(workdir)
  equal, all_moments = 0, []
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    futures = [pool.submit(one_run, folder, number, kills, seed, _VARIANTS[variant(number)])
               for number in range(runs)]
    for number, future in enumerate(futures):
      result, moments = future.result()
      same = result == uninterrupted[variant(number)]
      equal += same
      all_moments += moments
      verdict = 'equal' if same else 'DIFFERENT'
      print(f'run {number:2d}  {variant(number):18s}  {verdict}  killed at '
            + ', '.join(f'step {step}{" in a save" if saving else ""}' for step, saving in moments),
            flush=True)
  return equal, all_moments


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--runs', type=int, default=20)
  parser.add_argument('--kills', type=int, default=3)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(folder, 'cache')
    equal, moments = soak(pathlib.Path(folder), args.runs, args.kills, args.seed)
  steps = sorted(step for step, _ in moments)
  print(f'{equal} of {args.runs} runs equal; {len(moments)} kills, '
        f'{sum(saving for _, saving in moments)} of them in a save, at steps {steps}')
  return 0 if equal == args.runs else 1


if __name__ == '__main__':
  sys.exit(main())
