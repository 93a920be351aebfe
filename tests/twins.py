"""Slow float64 NumPy twins of the losses, the bank and kNN, written from the paper's equations."""

import numpy as np


def softmax(features, bank, index, temperature):
  """(loss [B], gradient in features [B, D]) of the full softmax, one image at a time."""
  losses, grads = [], []
  for v, i in zip(features, index):
    logits = bank @ v / temperature
    p = np.exp(logits - logits.max())
    losses.append(np.log(p.sum()) + logits.max() - logits[i])
    grads.append((p / p.sum() @ bank - bank[i]) / temperature)
  return np.array(losses), np.array(grads)


def positives(features, bank, index, near, temperature):
  """(loss [B], gradients) of the softmax with several positives."""
  losses, grads = [], []
  for b, (v, i) in enumerate(zip(features, index)):
    chosen = [i, *(j for j in near[b] if j >= 0)]
    p = np.exp(bank @ v / temperature)
    q = p[chosen] / p[chosen].sum()
    losses.append(np.log(p.sum()) - np.log(p[chosen].sum()))
    grads.append((p / p.sum() @ bank - q @ bank[chosen]) / temperature)
  return np.array(losses), np.array(grads)


def other_views(first, second, temperature, weight):
  """(loss [2, B], gradients [2, B, D] of its sum weighted by `weight` [2, B])."""
  views, losses, grads = (first, second), np.zeros((2, len(first))), np.zeros((2, *first.shape))
  for view in (0, 1):
    others = views[1 - view]
    for i, v in enumerate(views[view]):
      p = np.exp(others @ v / temperature)
      p /= p.sum()
      losses[view, i] = -np.log(p[i])
      p[i] -= 1
      grads[view, i] += weight[view, i] * (p @ others) / temperature
      grads[1 - view] += weight[view, i] * np.outer(p, v) / temperature
  return losses, grads


def triplet(features, bank, index, noise_index, margin):
  losses, grads = [], []
  for v, i, noise in zip(features, index, noise_index):
    excess = [margin + bank[j] @ v - bank[i] @ v if j >= 0 else 0.0 for j in noise]
    losses.append(np.mean(np.maximum(excess, 0)))
    grads.append(sum((bank[j] - bank[i] for j, e in zip(noise, excess) if e > 0),
                     np.zeros_like(v)) / len(noise))
  return np.array(losses), np.array(grads)


def class_weights_gradient(features, weights, index, temperature):
  """[N, D], of the mean over images: one image at a time."""
  gradient = np.zeros_like(weights)
  for v, i in zip(features, index):
    p = np.exp(weights @ v / temperature)
    p /= p.sum()
    p[i] -= 1
    gradient += np.outer(p, v) / temperature
  return gradient / len(features)


def sampled_softmax(features, bank, index, noise_index, temperature):
  losses, grads = [], []
  for v, i, noise in zip(features, index, noise_index):
    rows = bank[np.concatenate([[i], noise])]
    loss, grad = softmax(v[None], rows, [0], temperature)
    losses.append(loss[0])
    grads.append(grad[0])
  return np.array(losses), np.array(grads)


def nce(features, bank, index, noise_index, temperature, normalizer):
  """By Eq. 4-7 literally: P, h, and -log h - Σ log(1 - h)."""
  n, m = len(bank), noise_index.shape[1]
  losses, grads = [], []
  for v, i, noise in zip(features, index, noise_index):
    h = lambda j: (p := np.exp(bank[j] @ v / temperature) / normalizer) / (p + m / n)
    losses.append(-np.log(h(i)) - sum(np.log(1 - h(j)) for j in noise))
    grads.append((sum(h(j) * bank[j] for j in noise) - (1 - h(i)) * bank[i]) / temperature)
  return np.array(losses), np.array(grads)


def normalizer(features, bank, index, noise_index, temperature):
  columns = np.concatenate([index[:, None], noise_index], axis=1)
  scores = [np.exp(bank[c] @ v / temperature) for v, c in zip(features, columns)]
  return len(bank) * np.mean(scores)


def proximal(features, bank, index):
  difference = features - bank[index]
  return (difference**2).sum(axis=1), 2 * difference


def update(bank, index, features, momentum):
  new = bank.copy()
  for v, i in zip(features, index):  # from the bank before the step; the last occurrence stays
    row = momentum * bank[i] + (1 - momentum) * v
    new[i] = row / np.linalg.norm(row)
  return new


def class_scores(queries, bank, labels, k, temperature, num_classes):
  scores = np.zeros((len(queries), num_classes))
  for q, query in enumerate(queries):
    similarity = bank @ query
    for i in np.argsort(-similarity, kind='stable')[:k]:
      scores[q, labels[i]] += np.exp(similarity[i] / temperature)
  return scores


def unit_rows(random, *shape):
  x = random.standard_normal(shape)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)
