"""How programs are compiled: ahead of time, kept between runs, and deterministic if asked for."""

from collections.abc import Callable
import os
import time
from typing import Any

import jax

from instdisc_jax.runtime import profiling


def keep_programs(folder: str | os.PathLike[str]) -> None:
  """Keeps compiled programs in `folder`, unless JAX has been told another: resuming is instant."""
  options: Any = jax.config
  if options.jax_compilation_cache_dir is None:
    jax.config.update('jax_compilation_cache_dir', os.fspath(folder))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def make_gpus_deterministic() -> None:
  """The same bits from run to run on a GPU; to be called before JAX looks for devices."""
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_deterministic_ops=true'


def ahead_of_time(function: Any, arguments: tuple,
                  device: Any) -> tuple[Callable, profiling.Costs]:
  """Compiles a jitted function for these arguments: (the program, what it costs on `device`)."""
  start = time.monotonic()
  compiled = function.lower(*arguments).compile()
  return compiled, profiling.Costs(compiled, time.monotonic() - start, device)
