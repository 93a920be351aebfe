"""Which images to label: those that `instdisc_jax.classify --suggest` names, or any.

    python benchmarks/suggestions.py --workdir=runs/demo [--seeds 0 1 2 3 4]

On the digits, all 1,797 of them, embedded by the demo's encoder. 10 random images are labeled; 20
and then 30 more are chosen at random or as suggested. Accuracy on all images without a label.
"""

import argparse
import sys

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))
from instdisc_jax import inference  # noqa: E402
from instdisc_jax.data import digits  # noqa: E402
from instdisc_jax.evaluation import classifier  # noqa: E402

COUNTS = 10, 30, 60


def accuracy(embedding, label, rows, temperature):
  """(accuracy on the images without a label, predictions of all)."""
  fitted = classifier.fit(embedding[rows], [str(c) for c in label[rows]], [''] * len(rows),
                          temperature=temperature)
  found = fitted.predict(embedding)
  right = np.array(fitted.class_names)[found.label] == label.astype(str)
  return float(np.delete(right, rows).mean()), found


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--seeds', nargs='+', type=int, default=list(range(5)))
  args = parser.parse_args()
  model, sets = inference.load(args.workdir), digits.load()
  images, label = (np.concatenate(parts) for parts in zip(*sets))
  embedding, rows = model.embed(images), []
  for seed in args.seeds:
    order = np.random.RandomState(seed).permutation(len(label))
    chosen, found = np.sort(order[:COUNTS[0]]), None
    for count in COUNTS:
      measure = lambda labeled: accuracy(embedding, label, labeled, model.config.knn.temperature)
      if found is not None:
        more = classifier.suggest(embedding, chosen, found.confidence, count - len(chosen), seed)
        chosen = np.sort(np.concatenate([chosen, more]))
      suggested, found = measure(chosen)
      rows.append({'seed': seed, 'labels': count, 'random': measure(np.sort(order[:count]))[0],
                   'suggested': suggested})
  for count in COUNTS:
    of = [row for row in rows if row['labels'] == count]
    rows.append({'seed': 'mean', 'labels': count} | {
        name: float(np.mean([row[name] for row in of])) for name in ('random', 'suggested')})
  common.report('suggestions', 'accuracy of the other images', rows)


if __name__ == '__main__':
  main()
