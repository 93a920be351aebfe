import numpy as np
import pytest

from instdisc_jax.evaluation import geometry
from instdisc_jax.runtime import mesh as mesh_lib

X = np.random.default_rng(0).normal(size=(50, 6))
X /= np.linalg.norm(X, axis=1, keepdims=True)


def test_uniformity():
  squared = ((X[:, None] - X[None])**2).sum(-1)
  pairs = ~np.eye(50, dtype=bool)
  expected = np.log(np.mean(np.exp(-2 * squared[pairs])))
  assert geometry.uniformity(X) == pytest.approx(expected, abs=1e-5)
  assert geometry.uniformity(np.tile(X[:1], (9, 1))) == pytest.approx(0, abs=1e-5)


def test_effective_rank():
  assert geometry.effective_rank(np.eye(5)) == pytest.approx(5)
  assert geometry.effective_rank(np.outer(np.arange(4), np.ones(3))) == pytest.approx(1)
  values = np.linalg.svd(X, compute_uv=False)
  p = values / values.sum()
  assert geometry.effective_rank(X) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_alignment_and_staleness():
  assert geometry.alignment(X, X) == 0
  assert geometry.alignment(X, -X) == pytest.approx(4)
  assert geometry.staleness(X, X) == pytest.approx(0)
  assert geometry.staleness(X, -X) == pytest.approx(2)


def test_class_alignment():
  labels = np.arange(50) % 3 + 10 * (np.arange(50) == 49)  # the last is alone in its class
  squared = ((X[:, None] - X[None])**2).sum(-1)
  expected = [squared[np.ix_(labels == c, labels == c)][~np.eye(np.sum(labels == c), dtype=bool)]
              .mean() for c in range(3)]
  assert geometry.class_alignment(X, labels) == pytest.approx(np.mean(expected))
  order = np.random.default_rng(1).permutation(50)
  assert geometry.class_alignment(X[order], labels[order]) == pytest.approx(np.mean(expected))
  assert geometry.class_alignment(X, np.arange(50)) is None


def test_the_geometry_of_a_sharded_bank_is_that_of_its_rows():
  random = np.random.default_rng(1)
  for num_rows in (45, 3001):  # some, and more than are looked at
    rows = random.normal(size=(num_rows, 16)) * np.linspace(0.1, 1, 16)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    mesh = mesh_lib.make()
    bank = mesh_lib.shard_rows(rows.astype('f4'), mesh)
    uniformity, rank = geometry.of_bank(mesh, num_rows)(bank)
    chosen = rows[np.linspace(0, num_rows - 1, min(1024, num_rows)).round().astype(int)]
    assert float(uniformity) == pytest.approx(geometry.uniformity(chosen), abs=1e-4)
    assert float(rank) == pytest.approx(geometry.effective_rank(chosen), rel=1e-4)


def test_the_effective_rank_of_a_collapsed_bank_is_small():
  random = np.random.default_rng(2)
  for rank in (1, 3):
    rows = random.normal(size=(500, rank)) @ np.eye(rank, 32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rotated = rows @ np.linalg.qr(random.normal(size=(32, 32)))[0]
    mesh = mesh_lib.make()
    _, found = geometry.of_bank(mesh, 500)(mesh_lib.shard_rows(rotated.astype('f4'), mesh))
    assert float(found) == pytest.approx(geometry.effective_rank(rows), rel=1e-3)
    assert rank - 0.1 < found < rank + 1e-3
