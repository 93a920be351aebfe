import signal
import subprocess
import sys

import jax
import pytest

from instdisc_jax.runtime import errors, preemption
from instdisc_jax.runtime import mesh as mesh_lib

_FIRST = '''
import os, signal, sys, time
from instdisc_jax.runtime import errors, preemption
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
def command():
  with preemption.Watch() as watch:
    watch.check()
    for _ in range(2 if signal.{name} == signal.SIGHUP else 1):  # a terminal that closes sends two
      os.kill(os.getpid(), signal.{name})
      while watch.signal is None: time.sleep(0.01)
    time.sleep(0.1)
    watch.check()
sys.exit(errors.exit_code(command))
'''

# The main thread is in C and never gets to run a handler.
_SECOND = '''
import hashlib, os, signal, threading, time
from instdisc_jax.runtime import preemption
with preemption.Watch() as watch:
  def send():
    os.kill(os.getpid(), signal.SIGTERM)
    while watch.signal is None: time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
  threading.Timer(0.2, send).start()
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2**30)
'''


def _python(code):
  return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120,
                        check=False)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_a_signal_is_noted_and_ends_in_exit_code_75(name):
  done = _python(_FIRST.format(name=name))
  assert done.returncode == 75
  assert done.stderr == (f'{name}: saving and stopping; a second signal exits immediately\n'
                         f'stopped by {name}: run the same command again to resume\n')


def test_a_second_signal_ends_the_process_whatever_it_is_doing():
  assert _python(_SECOND).returncode == 128 + signal.SIGINT


def test_without_a_signal_nothing_stops():
  watch = preemption.Watch()
  watch.check()
  assert not watch.poll(mesh_lib.make(jax.devices()[:2]))
  watch.signal = 'SIGTERM'
  assert watch.poll(mesh_lib.make(jax.devices()[:2]))
  with pytest.raises(errors.Stopped):
    watch.check()


def test_signal_handlers_are_restored():
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with preemption.Watch():
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] != before
  assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_what_is_asked_for_most_urgently_is_found():
  watch, mesh = preemption.Watch(), mesh_lib.make(jax.devices()[:2])
  assert watch.poll(mesh, save=True) == preemption.SAVE
  watch.signal = 'SIGTERM'
  assert watch.poll(mesh, save=True) == watch.poll(mesh) == preemption.STOP


def test_a_closed_terminal_does_not_stop_what_nohup_protects():
  code = ('import signal, os\nfrom instdisc_jax.runtime import preemption\n'
          'signal.signal(signal.SIGHUP, signal.SIG_IGN)\n'
          'with preemption.Watch() as watch:\n'
          '  os.kill(os.getpid(), signal.SIGHUP)\n'
          'watch.check()')
  assert _python(code).returncode == 0
