"""What a step with two views costs, over one with one view: the ratio, in one run.

    python benchmarks/two_views.py [--model=resnet18_cifar] [--width=64] [--batch=128] [--side=32]

Full steps, from uint8 images on the device, of the exact softmax. The two are timed in turns.
Twice the images go through augmentation, encoder and loss, so the ratio should be near 2.
"""

import argparse

import common
import jax
import numpy as np
import train_step

from instdisc_jax.data import feeds
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import step as step_lib


class Steps:
  """Steps of one kind; calling it takes `count` more of them."""

  def __init__(self, views, args, count):
    setup, self._state = train_step.set_up(args, views=views)
    per_dispatch = 1 if mesh_lib.on_cpu(setup.mesh) else count
    self._step = step_lib.over_mesh(setup, feeds.Resident)
    self._inputs = train_step.resident(args, per_dispatch)
    self._calls = count // per_dispatch

  def __call__(self):
    for _ in range(self._calls):
      self._state, _ = self._step(self._state, *self._inputs)
    return self._state.step


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='resnet18_cifar')
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--side', type=int, default=32)
  parser.add_argument('--rows', type=int, default=50_000)
  parser.add_argument('--steps', type=int, default=0, help='per timing; default: 1 on CPU, else 50')
  parser.add_argument('--output')
  args = parser.parse_args()
  count = args.steps or (1 if jax.devices()[0].platform == 'cpu' else 50)
  one, two = (Steps(views, args, count) for views in (1, 2))
  times = [(common.seconds(one, 1, 1 if turn == 0 else 0),
            common.seconds(two, 1, 1 if turn == 0 else 0)) for turn in range(7)]
  first, second = np.median(times, axis=0) / count
  rows = [{'step': f'{args.model}, width {args.width}, B = {args.batch}, {args.side} px',
           'ratio': float(second / first), 'one view, ms': 1e3 * float(first),
           'two views, ms': 1e3 * float(second)}]
  common.report('two_views', f'a step with two views, N = {args.rows:,}', rows, args.output)


if __name__ == '__main__':
  main()
