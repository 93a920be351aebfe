"""A full run in a bucket, against an emulator of Google Cloud Storage; slow."""

import http.server
import json
import subprocess
import time

import pytest
from tensorboardX import record_writer

from instdisc_jax import evaluate
from instdisc_jax.runtime import errors, files, metrics
from tests import soak_kill

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def bucket():
  """The address of an empty bucket, which this process and its children reach."""
  pytest.importorskip('gcsfs', reason='gcsfs is not installed')
  emulator = pytest.importorskip('gcp_storage_emulator.server',
                                 reason='gcp-storage-emulator is not installed')
  download = emulator.objects.download

  def with_generation(request, response, storage, *args, **kwargs):  # which TensorStore needs
    download(request, response, storage, *args, **kwargs)
    if response.status.value < 400:
      response['x-goog-generation'] = storage.get_file_obj(
          request.params['bucket_name'], request.params['object_id'])['generation']

  emulator.objects.download = with_generation
  emulator.server.HTTPServer = http.server.ThreadingHTTPServer  # clients keep connections open
  server = emulator.create_server('127.0.0.1', 0, in_memory=True, default_bucket='bucket')
  server.start()
  address = f'http://127.0.0.1:{server._api._httpd.server_port}'
  variables = {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address,
               'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none', 'GOOGLE_CLOUD_PROJECT': 'none',
               'EPATH_USE_TF': 'false'}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in variables.items():
      patch.setenv(name, value)
    yield 'gs://bucket'
  # TensorBoard's writers upload their files once more at exit, and retry for minutes.
  record_writer.GCSRecordWriter.__del__ = lambda self: None
  server.stop()


def _start(workdir, log):
  with log.open('a') as file:
    return subprocess.Popen(soak_kill.command(workdir, 'checkpoint.every_steps=15'),
                            cwd=soak_kill.ROOT, stdout=file, stderr=file,
                            env=soak_kill.environment())


def test_a_run_in_a_bucket_killed_and_resumed_equals_one_in_a_folder(bucket, tmp_path):
  assert soak_kill.start(tmp_path / 'local').wait() == 0
  workdir, log = files.place(f'{bucket}/runs/remote'), tmp_path / 'log'
  process, end = _start(workdir, log), time.monotonic() + 240
  complete = workdir / 'checkpoints' / '15' / 'commit_success.txt'  # as Orbax marks it there
  while not complete.exists():
    assert process.poll() is None and time.monotonic() < end, log.read_text()
    time.sleep(0.1)
  process.kill()
  process.wait()
  assert _start(workdir, log).wait() == 0, log.read_text()
  assert 'resuming gs://bucket/runs/remote at step' in log.read_text()
  assert soak_kill.outcome(workdir) == soak_kill.outcome(tmp_path / 'local')
  names = {path.name for path in workdir.iterdir()}
  assert names >= {'config.json', 'metrics.jsonl', 'summary.json', 'curves.png', 'neighbors.png',
                   'checkpoints'} and 'lock' not in names
  assert any(name.startswith('events.out.tfevents') for name in names)
  steps = {int(path.name) for path in (workdir / 'checkpoints').iterdir()}
  assert steps == {30, 45, 60}

  assert evaluate.main([f'--workdir={workdir}', '--protocol=geometry']) == 0
  line, = (workdir / 'evaluations.jsonl').read_text().splitlines()
  assert json.loads(line)['step'] == 60


def test_metrics_in_a_bucket_are_rewritten_with_each_line(bucket):
  workdir = files.place(f'{bucket}/metrics')
  first = metrics.Metrics(workdir, 0)
  for step in (5, 10, 15):
    first.write(step, loss=1.0 / step)
    assert metrics.read(workdir)[-1] == {'step': step, 'loss': 1.0 / step}
  first.close()
  second = metrics.Metrics(workdir, 10)
  second.write(12, loss=2.0)
  second.close()
  assert [line['step'] for line in metrics.read(workdir)] == [5, 10, 12]


def test_an_unreachable_bucket_is_an_error_of_one_line():
  pytest.importorskip('gcsfs', reason='gcsfs is not installed')
  nowhere = {'STORAGE_EMULATOR_HOST': 'http://127.0.0.1:9', 'GOOGLE_CLOUD_PROJECT': 'none'}
  done = subprocess.run(soak_kill.command('gs://bucket/run'), cwd=soak_kill.ROOT, check=False,
                        capture_output=True, text=True, timeout=120,
                        env=soak_kill.environment() | nowhere)
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
  assert done.stderr.splitlines()[-1].startswith("error: 'gs://bucket/run' cannot be reached (")


def test_the_missing_package_of_a_bucket_is_named():
  with pytest.raises(errors.UserError, match='needs a package that is not installed .*s3fs'):
    files.place('s3://bucket/run')


def test_a_table_is_known_by_its_columns(tmp_path):
  (tmp_path / 'a.csv').write_text('path,label\n1,2\n')
  assert files.is_table(tmp_path / 'a.csv', ('path', 'label'))
  assert not files.is_table(tmp_path / 'a.csv', ('path',))
  assert not files.is_table(tmp_path, ('path',)) and not files.is_table(tmp_path / 'b', ('path',))
