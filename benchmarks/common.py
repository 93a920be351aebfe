"""Shared by the benchmarks: a description of the machine, timing, tables and JSON."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time

import jax
from rich import console as rich_console
from rich import table as rich_table

ROOT = pathlib.Path(__file__).parents[1]


def environment():
  """What a result depends on: the code's commit, the machine and the versions."""
  git = lambda *args: subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True,
                                     check=False).stdout.strip()
  versions = {}
  for name in ('jax', 'flax', 'optax', 'torch', 'faiss-cpu'):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return {
      'date': datetime.date.today().isoformat(),
      'commit': git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain') else ''),
      'device': f'{len(jax.devices())} x {jax.devices()[0].device_kind}',
      'processor': f'{os.cpu_count()} x {_processor()}',
      'python': platform.python_version(),
      **versions,
  }


def _processor():
  try:
    return re.search(r'model name\s*: (.*)', pathlib.Path('/proc/cpuinfo').read_text())[1]
  except (OSError, TypeError):
    return platform.processor() or platform.machine()


def seconds(fn, repeats=5, warm_up=1):
  """Median wall time of `fn()`, until its result is ready if it is a JAX array."""
  times = []
  for i in range(warm_up + repeats):
    start = time.perf_counter()
    jax.block_until_ready(fn())
    if i >= warm_up:
      times.append(time.perf_counter() - start)
  return sorted(times)[len(times) // 2]


def limits():
  """(matmul rate in FLOP/s, copy rate in bytes/s) of the device, measured now, in float32."""
  on_cpu = jax.devices()[0].platform == 'cpu'
  n = 2048 if on_cpu else 8192
  x = jax.random.normal(jax.random.key(0), (n, n))
  matmul = jax.jit(lambda x: x @ x)
  flops = 2 * n**3 / seconds(lambda: matmul(x))
  y = jax.random.normal(jax.random.key(0), (2**26 if on_cpu else 2**28,))
  add = jax.jit(lambda y: y + 1)
  return flops, 2 * y.size * 4 / seconds(lambda: add(y))


def report(name, title, rows, output=None, **extra):
  """Prints rows (dicts with the same keys) as a table and writes benchmarks/results/NAME.json."""
  table = rich_table.Table(title=title)
  for key in rows[0]:
    table.add_column(key, justify='right' if isinstance(rows[0][key], (int, float)) else 'left')
  for row in rows:
    table.add_row(*(_cell(value) for value in row.values()))
  rich_console.Console(width=160).print(table)
  file = pathlib.Path(output or ROOT / 'benchmarks' / 'results' / f'{name}.json')
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps({'environment': environment(), **extra, 'rows': rows}, indent=2,
                             ensure_ascii=False) + '\n')


def each_alone(doc, option, default, measure):
  """`measure(n)` for each of the numbers given with `--option`, each in a process of its own.

  Returns:
    What it returned for each; None in the process of one of them, which has printed it.
  """
  parser = argparse.ArgumentParser(description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(f'--{option}', nargs='+', type=int, default=default)
  parser.add_argument('--alone', type=int, help='measure one size in this process')
  args = parser.parse_args()
  if args.alone:
    print(json.dumps(measure(args.alone)))
    return None
  done = (subprocess.run([sys.executable, sys.argv[0], f'--alone={n}'], check=True,
                         stdout=subprocess.PIPE, text=True) for n in getattr(args, option))
  return [json.loads(one.stdout.splitlines()[-1]) for one in done]


def _cell(value):
  if isinstance(value, float):
    return f'{value:,.4g}' if abs(value) < 1e5 else f'{value:,.0f}'
  return '–' if value is None else f'{value:,}' if isinstance(value, int) else str(value)
