"""The launch scripts, with stand-ins for the cloud commands on the PATH."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'

# Appends its arguments (and its input) to calls.json as a line, then answers as bids.json says.
STAND_IN = '''#!{python} -IS
import json, os, pathlib, sys
here = pathlib.Path(os.environ['STAND_IN'])
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
given = sys.stdin.read() if arguments[-2:] == ['-f', '-'] else None
with (here / 'calls.json').open('a') as file:
  file.write(json.dumps([name, *arguments, *([given] if given else [])]) + '\\n')
for i, (words, answer, code) in enumerate(bids := json.loads((here / 'bids.json').read_text())):
  if all(word in ' '.join([name, *arguments]) for word in words.split()):
    if len(answer) > 1:  # the last answer is repeated
      bids[i][1] = answer[1:]
      (here / 'bids.json').write_text(json.dumps(bids))
    print(answer[0], end='')
    sys.exit(code)
'''


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """(script, arguments, bids) -> (exit code, stdout, stderr, calls).

  A bid is [words of the call, answers, exit code]. No other installed command is on the PATH.
  """
  (tmp_path / 'bin').mkdir()
  for name in ('bash', 'cat', 'dirname', 'sleep'):
    (tmp_path / 'bin' / name).symlink_to(shutil.which(name))
  for name in ('gcloud', 'kubectl', 'srun', 'scontrol'):
    (tmp_path / 'bin' / name).write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / 'bin' / name).chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
  monkeypatch.setenv('STAND_IN', str(tmp_path))
  monkeypatch.setenv('POLL_SECONDS', '0')
  monkeypatch.setenv('PYTHON', 'python')
  (tmp_path / 'configs').mkdir()
  monkeypatch.chdir(tmp_path)

  def call(script, *arguments, bids=()):
    (tmp_path / 'bids.json').write_text(json.dumps(bids))
    (tmp_path / 'calls.json').write_text('')
    ended = subprocess.run([tmp_path / 'bin' / 'bash', LAUNCH / script, *arguments], text=True,
                           capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    calls = [json.loads(line) for line in (tmp_path / 'calls.json').read_text().splitlines()]
    return ended.returncode, ended.stdout, ended.stderr, calls

  return call


TPU = ['--name=r18', '--zone=us-west4-a', '--source=git+https://a/b']
TYPES = [('v5litepod-8', 'v2-alpha-tpuv5-lite'), ('v5p-16', 'v2-alpha-tpuv5'),
         ('v6e-8', 'v2-alpha-tpuv6e'), ('v4-32', 'tpu-ubuntu2204-base')]
RUN = ['--', '--config=configs/imagenet.py:resnet18', '--workdir=gs://bucket/r 18']
START = "bash on_host.sh start --config=configs/imagenet.py:resnet18 --workdir=gs://bucket/r\\ 18"


@pytest.mark.parametrize('command, options, expected', [
    ('create', ['--type=v5litepod-8', '--direct', '--project=p'], [
        'gcloud compute tpus tpu-vm create r18 --zone=us-west4-a --project=p '
        '--accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite']),
    ('setup', [], [
        f'gcloud compute tpus tpu-vm scp --recurse configs {LAUNCH}/on_host.sh r18: '
        '--zone=us-west4-a --worker=all',
        'gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
        "--command='bash on_host.sh install git+https://a/b'"]),
    ('create', ['--type=v5litepod-64', '--spot', '--data-disk=images', '--project=p'], [
        'gcloud compute tpus queued-resources create r18 --node-id=r18 --zone=us-west4-a '
        '--project=p --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot '
        '--data-disk=source=projects/p/zones/us-west4-a/disks/images,mode=read-only']),
    ('setup', ['--data-disk=images'], [
        f'gcloud compute tpus tpu-vm scp --recurse configs {LAUNCH}/on_host.sh r18: '
        '--zone=us-west4-a --worker=all',
        'gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
        "--command='bash on_host.sh install git+https://a/b'",
        'gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
        "--command='bash on_host.sh mount'"]),
    ('setup', ['--data=gs://bucket/my data'], [
        f'gcloud compute tpus tpu-vm scp --recurse configs {LAUNCH}/on_host.sh r18: '
        '--zone=us-west4-a --worker=all',
        'gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
        "--command='bash on_host.sh install git+https://a/b'",
        'gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
        '--command=' + shlex.quote("bash on_host.sh data gs://bucket/my\\ data")]),
    ('tail', [], ['gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=0 '
                  "--command='tail -n 50 -F run.log'"]),
    ('stop', [], ['gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
                  "--command='bash on_host.sh stop'"]),
    ('delete', [], ['gcloud compute tpus queued-resources delete r18 --zone=us-west4-a --force '
                    '--quiet']),
    ('all', ['--type=v5litepod-64', '--spot'], [
        'gcloud compute tpus queued-resources create r18 --node-id=r18 --zone=us-west4-a '
        '--accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot',
        f'gcloud compute tpus tpu-vm scp --recurse configs {LAUNCH}/on_host.sh r18: '
        '--zone=us-west4-a --worker=all',
        'gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
        "--command='bash on_host.sh install git+https://a/b'",
        'gcloud compute tpus tpu-vm ssh r18 --zone=us-west4-a --worker=all '
        f'--command={shlex.quote(START)}'])])
def test_a_dry_run_shows_the_commands_for_a_tpu_and_runs_none(cloud, command, options, expected):
  code, shown, _, calls = cloud('tpu_vm.sh', command, *TPU, *options, '--dry-run', *RUN)
  lines = [line for line in shown.splitlines() if not line.startswith('#')]
  assert code == 0 and not calls
  assert [shlex.split(line) for line in lines] == [shlex.split(line) for line in expected]


@pytest.mark.parametrize('type_, runtime', TYPES)
def test_each_type_of_tpu_gets_its_runtime(cloud, type_, runtime):
  code, shown, _, _ = cloud('tpu_vm.sh', 'create', *TPU, f'--type={type_}', '--dry-run')
  assert code == 0 and f'--runtime-version={runtime} ' in shown


def verbs(calls):
  """The actions: commands of gcloud and commands sent to a host, without the state queries."""
  return [' '.join(call[3:5]) if 'ssh' not in call else call[-1].partition('on_host.sh ')[2]
          for call in calls if 'describe' not in call]


DESCRIBE = 'queued-resources describe'
SET_UP = ['tpu-vm scp', 'install git+https://a/b', START[16:]]
ONCE = ['queued-resources create', *SET_UP, 'code']
ALL = ['all', *TPU, '--type=v5litepod-64', '--spot', '--yes', *RUN]


@pytest.mark.parametrize('states', [
    ['SUSPENDED', 'SUSPENDED', 'SUSPENDED'],
    ['SUSPENDING', 'SUSPENDING', 'SUSPENDING', 'SUSPENDED'],  # the cloud is slow
    ['DELETING', 'DELETING', 'DELETING']])
def test_a_preempted_tpu_is_recreated_and_the_run_resumes(cloud, states):
  code, shown, _, calls = cloud('tpu_vm.sh', *ALL, bids=[
      [DESCRIBE, ['', 'PROVISIONING', 'ACTIVE', 'ACTIVE', *states, '', 'ACTIVE'], 0],
      ['ssh code', ['', '0'], 0]])
  assert code == 0 and f'r18 is {states[0]}: recreating it and resuming the run' in shown
  kept = [verb for verb in verbs(calls) if verb != 'code']
  deleted = ['queued-resources delete'] * (states[-1] == 'SUSPENDED')
  assert kept == [*ONCE[:-1], *deleted, *ONCE[:-1], '']
  assert calls[-1][-1] == '--command=tail -n 20 run.log'


def test_a_tpu_preempted_during_setup_or_before_the_cloud_reports_it_is_recreated(cloud):
  code, _, _, calls = cloud('tpu_vm.sh', *ALL, bids=[  # installing fails, then the TPU is lost
      [DESCRIBE, ['', 'ACTIVE', 'ACTIVE', 'SUSPENDED', 'SUSPENDED', '', 'ACTIVE'], 0],
      ['ssh install', ['', ''], 1], ['ssh code', ['0'], 0]])
  assert code == 1 and verbs(calls).count('queued-resources create') == 2
  # The host saves and stops, then the TPU is lost.
  code, _, _, calls = cloud('tpu_vm.sh', *ALL, bids=[
      [DESCRIBE, [*['ACTIVE'] * 4, 'SUSPENDED', 'SUSPENDED', '', 'ACTIVE'], 0],
      ['ssh code', ['75', '0'], 0]])
  assert code == 0
  assert verbs(calls) == [*SET_UP, 'code', 'queued-resources delete', *ONCE, '']


@pytest.mark.parametrize('codes, times, ended', [
    (['0'], 1, 0), (['2'], 1, 2), (['75'], 1, 75),  # success; a mistake; stopped by the user
    (['1', '0'], 2, 0), (['gone', '0'], 2, 0), (['1'], 3, 1), (['gone'], 3, 1),
    (['1', *[''] * 21, '1', '1', '0'], 3, 1)])  # however long it ran before it failed
def test_a_failing_run_is_tried_up_to_three_times(cloud, codes, times, ended):
  code, _, _, calls = cloud('tpu_vm.sh', *ALL, bids=[
      [DESCRIBE, ['ACTIVE'], 0], ['ssh code', codes, 0]])
  kept = [verb for verb in verbs(calls) if verb != 'code']
  assert (code, kept) == (ended, [*([*SET_UP, 'stop'] * times)[:-1], ''])


def test_a_cloud_that_does_not_answer_does_not_mean_that_the_tpu_is_gone(cloud):
  code, _, told, calls = cloud('tpu_vm.sh', 'create', *TPU, '--type=v5litepod-8', '--yes', bids=[
      [DESCRIBE, [''], 1]])
  assert code == 1 and told.endswith('failed: no answer from gcloud about r18\n')
  assert not verbs(calls)


@pytest.mark.parametrize('arguments, words', [
    (['--name=r18', '--zone=z', '--type=v5litepod-8'], 'nothing to install: set --source'),
    ([*TPU, '--type=v5litepod-8', '--data=bucket'], "--data is 'bucket', must be gs://"),
    (TPU, 'no TPU type: set --type=TYPE')])
def test_all_finds_mistakes_before_it_creates_anything(cloud, arguments, words):
  code, _, told, calls = cloud('tpu_vm.sh', 'all', *arguments, '--yes', *RUN)
  assert code == 2 and words in told and not calls


def test_nothing_that_costs_money_is_created_or_deleted_without_confirmation(cloud):
  for command in ('create', 'delete'):
    code, _, told, calls = cloud('tpu_vm.sh', command, *TPU, '--type=v5litepod-8')
    assert code == 2 and 'set --yes' in told and told.count('\n') == 1
    assert all('describe' in call for call in calls)
  code, _, told, calls = cloud('tpu_vm.sh', 'create', *TPU, '--type=v5litepod-8', bids=[
      [DESCRIBE, ['SUSPENDED'], 0]])
  assert code == 2 and 'delete r18, which is SUSPENDED, and create 1 TPU v5litepod-8 named' in told
  assert not verbs(calls)
  code, _, told, calls = cloud('tpu_vm.sh', *(word for word in ALL if word != '--yes'), bids=[
      [DESCRIBE, ['ACTIVE'], 0], ['ssh code', ['0'], 0]])  # it may have to be recreated later
  assert code == 2 and 'set --yes' in told and 'delete and recreate it' in told and not calls
  code, _, told, calls = cloud('gke.sh', 'delete', '--name=r18')
  assert code == 2 and 'set --yes' in told and not calls


@pytest.fixture
def on_host(tmp_path, monkeypatch):
  """(words) -> what on_host.sh prints for them; its runs do what instdisc/bin/python says."""
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'instdisc' / 'bin').mkdir(parents=True)
  return lambda *words: subprocess.run(['bash', LAUNCH / 'on_host.sh', *words], text=True,
                                       capture_output=True, timeout=60).stdout


def start_on_host(on_host, folder, trap):
  """Starts a run with that trap, and waits until it is set."""
  python = folder / 'instdisc' / 'bin' / 'python'
  python.write_text(f'#!/bin/bash\n{trap}\nprintf "%s|" "$@"\nwhile :; do sleep 0.05; done\n')
  python.chmod(0o755)
  assert on_host('start', '--workdir=a b') == ''
  wait_for('|--workdir=a b|', (folder / 'run.log').read_text)


def wait_for(words, answer):
  end = time.monotonic() + 30
  while words not in answer() and time.monotonic() < end:
    time.sleep(0.05)
  assert words in answer()


@pytest.mark.parametrize('trap, code', [
    ('', '75'), ('trap "exit 1" TERM', '75'),  # before it handles signals; without the other hosts
    ('trap "exit 0" TERM', '0')])  # it was about to end
def test_a_run_that_is_stopped_while_it_starts_has_not_failed(on_host, tmp_path, trap, code):
  start_on_host(on_host, tmp_path, trap)
  on_host('stop')
  assert on_host('code') == f'{code}\n'


def test_on_a_host_a_run_starts_once_saves_when_stopped_and_reports_its_code(on_host, tmp_path):
  log = tmp_path / 'run.log'
  start_on_host(on_host, tmp_path, 'trap "sleep 1; echo saved; exit 75" TERM')
  assert on_host('start', '--workdir=c') == 'already running\n'
  assert on_host('install', 'x') == 'a run is active: nothing installed\n'
  assert on_host('code') == ''
  stops = [subprocess.Popen(['bash', LAUNCH / 'on_host.sh', 'stop']) for _ in range(2)]
  assert [stop.wait(60) for stop in stops] == [0, 0]  # the second also waits, and sends no signal
  assert on_host('code') == '75\n'
  assert log.read_text() == '-m|instdisc_jax.main|--distributed|--workdir=a b|saved\n'
  assert on_host('stop') == ''
  (tmp_path / 'run.code').unlink()
  (tmp_path / 'run.pid').write_text(str(os.getpid()))  # the ID of another process
  assert on_host('code') == 'gone\n'


GKE = ['run', '--name=r18', '--image=a/b:1', '--hosts=4']
IN_BUCKET = '--workdir=gs://b/"r 18"'


@pytest.mark.parametrize('hardware, resource, chips, selector', [
    (['--tpu=tpu-v5-lite-podslice', '--topology=4x4'], 'google.com/tpu', 4,
     {'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
      'cloud.google.com/gke-tpu-topology': '4x4'}),
    (['--gpu=nvidia-h100-80gb'], 'nvidia.com/gpu', 8,
     {'cloud.google.com/gke-accelerator': 'nvidia-h100-80gb'})])
def test_a_jobset_is_filled_in_and_applied_once(cloud, hardware, resource, chips, selector):
  yaml = pytest.importorskip('yaml')
  arguments = [*GKE, *hardware, '--namespace=n', '--bucket=b', '--service-account=s', '--yes',
               '--', '--config=configs/fake.py', IN_BUCKET, '$(HOME)']
  code, _, _, calls = cloud('gke.sh', *arguments, bids=[['get jobset', [''], 1]])
  assert code == 0
  assert calls[0] == ['kubectl', '--namespace=n', 'get', 'jobset', 'r18',
                      '--output=jsonpath={.status.terminalState}']
  assert calls[1][:-1] == ['kubectl', '--namespace=n', 'apply', '-f', '-']
  jobset = yaml.safe_load(calls[1][-1])
  spec = jobset['spec']['replicatedJobs'][0]['template']['spec']
  pod = spec['template']['spec']
  assert jobset['kind'] == 'JobSet' and jobset['metadata']['name'] == 'r18'
  assert spec['parallelism'] == spec['completions'] == 4
  assert pod['nodeSelector'] == selector
  container, = pod['containers']
  assert container['image'] == 'a/b:1' and container['resources']['limits'] == {resource: chips}
  assert container['command'] == [
      'python', '-m', 'instdisc_jax.main', '--coordinator=r18-host-0-0.r18:8476',
      '--num_processes=4', '--process_id=$(JOB_COMPLETION_INDEX)', '--config=configs/fake.py',
      IN_BUCKET, '$$(HOME)']
  assert {v['name']: v.get('csi', {}).get('volumeAttributes', {}).get('bucketName')
          for v in pod['volumes']} == {'shm': None, 'bucket': 'b'}
  assert {m['name']: m['mountPath'] for m in container['volumeMounts']} == {
      'shm': '/dev/shm', 'bucket': '/bucket'}
  assert pod['serviceAccountName'] == 's'
  code, shown, _, calls = cloud('gke.sh', *arguments)  # kubectl finds it
  assert code == 0 and 'r18 already exists' in shown and len(calls) == 1
  code, _, told, calls = cloud('gke.sh', *arguments, bids=[['get jobset', ['Failed'], 0]])
  assert code == 2 and len(calls) == 1
  assert told == ('error: r18 has ended (Failed): delete it first, '
                  'launch/gke.sh delete --name=r18\n')
  code, shown, _, calls = cloud('gke.sh', *arguments[:arguments.index('--')], '--dry-run',
                                *arguments[arguments.index('--'):])
  first, _, rest = shown.partition('\n')
  assert code == 0 and not calls
  assert shlex.split(first) == ['kubectl', '--namespace=n', 'apply', '-f', '-']
  assert yaml.safe_load(rest) == jobset


def test_a_deleted_jobset_has_saved_and_one_that_does_not_exist_has_no_status(cloud):
  code, _, _, calls = cloud('gke.sh', 'delete', '--name=r18', '--yes')
  assert code == 0 and calls == [
      ['kubectl', 'delete', 'jobset', 'r18', '--cascade=foreground', '--wait']]
  code, _, _, calls = cloud('gke.sh', 'status', '--name=r18', bids=[['get jobset', [''], 1]])
  assert code == 1 and calls == [['kubectl', 'get', 'jobset', 'r18']]
  code, _, _, calls = cloud('gke.sh', 'status', '--name=r18')
  assert code == 0 and [call[:3] for call in calls] == [
      ['kubectl', 'get', 'jobset'], ['kubectl', 'get', 'pods']]


@pytest.mark.parametrize('script, options, topology', [
    ('tpu_vm.sh', ['all', '--type=v5litepod-8'], 'v5e:2x4'),
    ('tpu_vm.sh', ['create', '--type=v6e-256'], 'v6e:16x16'),
    ('tpu_vm.sh', ['run', '--type=v5p-16'], 'v5p:2x2x2'),
    ('gke.sh', ['run', '--tpu=tpu-v5-lite-podslice', '--topology=4x4'], 'v5e:4x4'),
    ('gke.sh', ['run', '--tpu=tpu-v6e-slice', '--topology=8x8'], 'v6e:8x8'),
    ('gke.sh', ['run', '--gpu=nvidia-h100-80gb', '--hosts=2'], 'h100:16')])
@pytest.mark.parametrize('ended', [0, 1])
def test_a_run_is_compiled_before_anything_is_made(cloud, tmp_path, script, options, topology,
                                                   ended):
  (tmp_path / 'bin' / 'python').write_text(STAND_IN.format(python=sys.executable))
  (tmp_path / 'bin' / 'python').chmod(0o755)
  common = TPU if script == 'tpu_vm.sh' else ['--name=r18', '--image=a/b:1']
  code, _, error, calls = cloud(
      script, *options, *common, '--check', '--yes', *RUN, '--config.seed=3',
      bids=[['instdisc_jax.compile', [''], ended], ['describe', ['ACTIVE\n'], 0],
            ['get jobset', [''], 1], ['on_host.sh code', ['0\n'], 0]])
  assert [call for call in calls if call[0] == 'python'] == [
      ['python', '-m', 'instdisc_jax.compile', f'--topology={topology}',
       '--config=configs/imagenet.py:resnet18', '--config.seed=3']]
  if ended:
    assert code == 2 and 'does not fit' in error and 'nothing was created or started' in error
    assert all(call[0] == 'python' or 'get' in call for call in calls)
  else:
    assert code == 0 and len(calls) > 1


@pytest.mark.parametrize('script, options, message', [
    ('tpu_vm.sh', ['create', *TPU, '--type=v4-32'], '--check knows v5litepod, v6e and v5p, not '
     '--type=v4-32: leave out --check'),
    ('tpu_vm.sh', ['create', *TPU, '--type=v6e-7'], '--check knows no slice like --type=v6e-7'),
    ('tpu_vm.sh', ['create', *TPU, '--type=v6e-x'], "--type is 'v6e-x', must end in a number"),
    ('tpu_vm.sh', ['run', *TPU], 'no TPU type: set --type=TYPE'),
    ('gke.sh', ['run', '--name=r18', '--image=a', '--gpu=nvidia-l4'], '--check knows '
     'tpu-v5-lite-podslice'),
    ('gke.sh', ['run', '--name=r18', '--image=a', '--gpu=nvidia-h100-80gb', '--queue=A b'],
     "--queue is 'A b', must be lower-case letters")])
def test_what_cannot_be_checked_is_said(cloud, script, options, message):
  code, _, error, calls = cloud(script, *options, '--check', '--yes', *RUN,
                                bids=[['get jobset', [''], 1]])
  assert code == 2 and error.startswith(f'error: {message}') and error.count('\n') == 1
  assert not [call for call in calls if 'get' not in call]


def test_a_jobset_may_wait_in_a_queue(cloud):
  yaml = pytest.importorskip('yaml')
  arguments = [*GKE, '--gpu=nvidia-h100-80gb', '--yes', '--dry-run']
  labels = []
  for queue in ([], ['--queue=team-a']):
    code, shown, _, _ = cloud('gke.sh', *arguments, *queue, *RUN)
    assert code == 0
    labels.append(yaml.safe_load(shown.partition('\n')[2])['metadata']['labels'])
  assert labels == [{}, {'kueue.x-k8s.io/queue-name': 'team-a'}]


def test_skypilot_sets_a_machine_up_again_whatever_the_source(cloud, tmp_path, monkeypatch):
  yaml = pytest.importorskip('yaml')
  (tmp_path / 'bin' / 'uv').symlink_to('gcloud')
  (tmp_path / 'setup.sh').write_text(yaml.safe_load((LAUNCH / 'sky.yaml').read_text())['setup'])
  monkeypatch.setenv('SOURCE', 'git+https://a/b')
  code, _, _, calls = cloud(tmp_path / 'setup.sh')
  assert code == 0 and calls == [
      ['uv', 'venv', '--allow-existing', '--python', '3.11', '.venv'],
      ['uv', 'pip', 'install', '--quiet', '--python', '.venv/bin/python', 'jax[cuda12]', 'gcsfs',
       'git+https://a/b']]


@pytest.mark.slow
def test_skypilot_reads_its_task():
  sky = pytest.importorskip('sky', reason='skypilot is not installed')
  task = sky.Task.from_yaml(str(LAUNCH / 'sky.yaml'))
  assert {str(r.accelerators) for r in task.resources} == {"{'H100': 8}", "{'A100-80GB': 8}"}
  assert all(r.use_spot for r in task.resources)
  assert 'instdisc_jax.main' in task.run and task.envs['WORKDIR'].startswith('gs://')


SRUN = ['srun', '--kill-on-bad-exit=0', '--gpu-bind=none', 'python', '-m', 'instdisc_jax.main',
        '--distributed', '--config=c.py', '--workdir=/a b']


def test_slurm_starts_a_process_per_gpu_and_requeues_a_stopped_run(cloud, monkeypatch):
  code, shown, _, calls = cloud('slurm.sbatch', '--dry-run', *SRUN[-2:])
  assert code == 0 and shlex.split(shown) == SRUN and not calls
  monkeypatch.setenv('SLURM_JOB_ID', '17')
  monkeypatch.setenv('SLURM_CPUS_PER_TASK', '8')
  srun = [*SRUN[:3], '--cpus-per-task=8', *SRUN[3:]]
  show, requeue = ['scontrol', 'show', 'job', '17'], ['scontrol', 'requeue', '17']
  for ended, state, later in ((0, '', []), (1, '', []), (75, 'RUNNING', [show, requeue]),
                              (75, 'CANCELLED', [show])):  # by scancel
    code, _, _, calls = cloud('slurm.sbatch', *SRUN[-2:], bids=[
        ['srun', [''], ended], ['show', [f'   JobState={state} Reason=None'], 0]])
    assert code == ended and calls == [srun, *later]


@pytest.mark.parametrize('command', ['main', 'embed', 'evaluate'])
def test_a_local_dry_run_shows_the_processes_of_the_command(cloud, monkeypatch, command):
  monkeypatch.setenv('PYTHON', sys.executable)
  chosen = [f'--command={command}'] * (command != 'main')  # the default
  code, shown, told, _ = cloud('local.sh', *chosen, '--processes=02', '--devices=4',
                               '--heartbeat=9', '--dry-run', '--', '--workdir=a b')
  first, second = (shlex.split(line) for line in shown.splitlines())
  coordinator = first[-4]
  assert code == 0 and not told and re.fullmatch(r'--coordinator=127.0.0.1:\d+', coordinator)
  for i, words in enumerate((first, second)):
    assert words == ['env', 'JAX_PLATFORMS=cpu', 'JAX_NUM_CPU_DEVICES=4', sys.executable, '-m',
                     f'instdisc_jax.{command}', '--workdir=a b', coordinator, '--num_processes=2',
                     f'--process_id={i}', '--heartbeat_seconds=9']


# Process 0 shows the signals that it gets, and saves; process 1 does not handle them yet.
STARTING = '''#!{python} -IS
import signal, sys, time
if sys.argv[1] == '-c':  # asked for a port
  sys.exit(print(1234))
got = []
if '--process_id=0' in sys.argv:
  for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, lambda number, _: got.append(number))
print('started', flush=True)
while not got:
  time.sleep(0.05)
time.sleep(1)
print(*[signal.Signals(number).name for number in got])
sys.exit(75)
'''


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_ctrl_c_ends_a_process_that_still_starts_and_is_one_signal_to_the_others(tmp_path, name):
  python, number = tmp_path / 'python', getattr(signal, name)
  python.write_text(STARTING.format(python=sys.executable))
  python.chmod(0o755)
  launcher = subprocess.Popen(
      ['bash', LAUNCH / 'local.sh', '--', 'a'], env={**os.environ, 'PYTHON': str(python)},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
  try:
    assert launcher.stdout.readline() == 'started\n'
    if number == signal.SIGINT:
      os.killpg(launcher.pid, number)  # as a terminal does
    else:
      launcher.send_signal(number)
    shown, told = launcher.communicate(timeout=20)
    assert shown == f'{name}\n'
    assert told.startswith('process 1 of 2 died first (signal 15): ending the others\n')
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize('script, arguments, words', [
    ('tpu_vm.sh', [], 'no command, must be create, setup,'),
    ('tpu_vm.sh', ['start', *TPU], "unknown command 'start', must be create, setup,"),
    ('tpu_vm.sh', ['create', '--zone=z'], 'no name: set --name=NAME'),
    ('tpu_vm.sh', ['create', '--name=n'], 'no zone: set --zone=ZONE'),
    ('tpu_vm.sh', ['create', *TPU], 'no TPU type: set --type=TYPE'),
    ('tpu_vm.sh', ['create', *TPU, '--size=8'], "unknown argument '--size=8': see --help"),
    ('tpu_vm.sh', ['create', *TPU, '--type=v9-8'], 'no known runtime for --type=v9-8'),
    ('tpu_vm.sh', ['create', *TPU, '--type=v4-8', '--data-disk=d'], 'set --project=PROJECT'),
    ('tpu_vm.sh', ['setup', '--name=n', '--zone=z'], 'nothing to install: set --source=ADDRESS'),
    ('tpu_vm.sh', ['setup', *TPU, '--configs=none'], "no folder 'none': set --configs"),
    ('tpu_vm.sh', ['setup', *TPU, '--data=bucket'], "--data is 'bucket', must be gs://"),
    ('tpu_vm.sh', ['run', *TPU], 'no arguments for instdisc_jax.main: put them after --'),
    ('tpu_vm.sh', ['all', *TPU, '--', '--workdir=/home/run'], 'set --workdir=gs://BUCKET/FOLDER'),
    ('tpu_vm.sh', ['all', *TPU, '--type=v5litepod-8', '--spot', '--direct', *RUN],
     '--spot and --direct must not both be set for all'),
    ('gke.sh', ['run', '--name=R18'], "name is 'R18', must be lower-case letters"),
    ('gke.sh', ['run', '--name=r18'], 'no image: set --image=IMAGE'),
    ('gke.sh', GKE, 'no hardware: set --tpu=ACCELERATOR and --topology, or --gpu'),
    ('gke.sh', [*GKE, '--tpu=t'], 'no TPU topology: set --topology=TOPOLOGY'),
    ('gke.sh', [*GKE, '--gpu=g', '--hosts=0', '--', 'a'], "--hosts is '0', must be an integer"),
    ('gke.sh', [*GKE, '--tpu=t', '--topology=4'], "--topology is '4', must be integers joined"),
    ('gke.sh', [*GKE, '--tpu=t', '--topology=2x4'],
     '--topology=2x4 has 8 chips, but 4 host(s) with 4 chips each have 16: set --hosts or --chips'),
    ('gke.sh', [*GKE, '--gpu=g', '--', '--workdir=/runs'], 'set --workdir=gs://BUCKET/FOLDER'),
    ('gke.sh', [*GKE, '--gpu=g'], 'no arguments for instdisc_jax.main: put them after --'),
    ('slurm.sbatch', [], 'no arguments for instdisc_jax.main'),
    ('slurm.sbatch', ['--config=c.py'], 'no workdir: set --workdir=DIR'),
    ('slurm.sbatch', ['--workdir=/a'], 'not in a Slurm job: start it with sbatch'),
    ('local.sh', ['--devices=2'], 'no arguments for instdisc_jax.main: put them after --'),
    ('local.sh', ['--command=embed'], 'no arguments for instdisc_jax.embed: put them after --'),
    ('local.sh', ['--command=train', '--', 'a'],
     "--command is 'train', must be main, embed or evaluate: set --command"),
    ('local.sh', ['--heartbeat=00', '--', 'a'],
     "--heartbeat is '0', must be an integer of at least 1: set --heartbeat=N"),
    ('local.sh', ['--dry-run=1', '--', 'a'], "unknown argument '--dry-run=1': see --help"),
    ('local.sh', ['--processes', '--', 'a'], "unknown argument '--processes': see --help")])
def test_a_wrong_call_is_answered_with_one_line(cloud, script, arguments, words):
  code, shown, told, calls = cloud(script, *arguments)
  assert (code, shown, calls) == (2, '', [])
  assert told.startswith('error: ') and words in told and told.count('\n') == 1


@pytest.mark.parametrize('script', ['tpu_vm.sh', 'gke.sh', 'slurm.sbatch', 'local.sh'])
def test_help_and_a_missing_tool(cloud, script, monkeypatch, tmp_path):
  code, shown, _, _ = cloud(script, '--help')
  assert code == 0 and shown.startswith('usage: ') and '--dry-run' in shown
  missing = {'tpu_vm.sh': ('gcloud', ['stop', *TPU]), 'gke.sh': ('kubectl', ['status', '--name=n'])}
  if script in missing:
    tool, arguments = missing[script]
    (tmp_path / 'bin' / tool).unlink()
    code, _, told, _ = cloud(script, *arguments)
    assert code == 2 and f"no '{tool}' on the PATH" in told and told.count('\n') == 1
