"""Compilation of programs: ahead of time, cached between runs, and deterministic on request."""

from collections.abc import Callable
import os
import time
from typing import Any

import jax

from instdisc_jax.runtime import profiling


def keep_programs(folder: str | os.PathLike[str]) -> None:
  """Caches compiled programs in `folder` for later runs, unless JAX already has a cache folder."""
  options: Any = jax.config
  if options.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', os.fspath(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def make_gpus_deterministic() -> None:
  """Makes GPU results bitwise reproducible; must be called before JAX looks for devices."""
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_deterministic_ops=true'


def ahead_of_time(function: Any, arguments: tuple,
                  device: Any) -> tuple[Callable, profiling.Costs]:
  """Compiles a jitted function for these arguments: (the program, its cost on `device`)."""
  start = time.monotonic()
  compiled = function.lower(*arguments).compile()
  return compiled, profiling.Costs(compiled, time.monotonic() - start, device)
