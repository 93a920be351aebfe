"""The launch scripts, with stand-ins for the clouds' commands on the PATH."""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'

# Notes its arguments (and what it is given to read) as a line of calls.json, then does as bid.
STAND_IN = '''#!{python}
import json, os, pathlib, sys
here = pathlib.Path(os.environ['STAND_IN'])
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
given = sys.stdin.read() if arguments[-2:] == ['-f', '-'] else None
with (here / 'calls.json').open('a') as file:
  file.write(json.dumps([name, *arguments, *([given] if given else [])]) + '\\n')
for i, (words, answer, code) in enumerate(bids := json.loads((here / 'bids.json').read_text())):
  if all(word in ' '.join([name, *arguments]) for word in words.split()):
    if len(answer) > 1:  # the last answer stays
      bids[i][1] = answer[1:]
      (here / 'bids.json').write_text(json.dumps(bids))
    print(answer[0], end='')
    sys.exit(code)
'''


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """(script, arguments, bids) -> (exit code, stdout, stderr, calls).

  A bid is [words of the call, answers, exit code]. Nothing else that is installed is on the PATH.
  """
  (tmp_path / 'bin').mkdir()
  for name in ('bash', 'cat', 'dirname', 'sleep', 'tr'):
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


def test_a_tpu_that_was_taken_away_is_made_again_and_the_run_goes_on(cloud):
  describe = 'queued-resources describe'
  code, shown, _, calls = cloud(
      'tpu_vm.sh', 'all', *TPU, '--type=v5litepod-64', '--spot', '--yes', *RUN, bids=[
          [describe, ['', 'PROVISIONING', 'ACTIVE', 'ACTIVE', 'SUSPENDED',  # taken away
                      'SUSPENDED', 'ACTIVE', 'ACTIVE'], 0],
          ['ssh code', ['', '0'], 0]])
  assert code == 0 and 'r18 is SUSPENDED: it is made again, and the run goes on' in shown
  verbs = [' '.join(call[3:5]) if 'ssh' not in call else call[-1].partition('on_host.sh ')[2]
           for call in calls if 'describe' not in call]
  once = ['queued-resources create', 'tpu-vm scp', 'install git+https://a/b', START[16:], 'code']
  assert verbs == [*once, 'queued-resources delete', *once, '']
  assert calls[-1][-1] == '--command=tail -n 20 run.log'


def test_a_run_that_fails_on_the_tpu_ends_the_script_with_its_code(cloud):
  code, _, _, calls = cloud('tpu_vm.sh', 'all', *TPU, '--type=v5litepod-8', *RUN, bids=[
      ['queued-resources describe', ['ACTIVE'], 0], ['ssh code', ['', '2'], 0]])
  assert code == 2
  assert not any('create' in call for call in calls)  # it was there already


def test_nothing_that_costs_money_is_made_or_deleted_without_a_yes(cloud):
  for command in ('create', 'delete'):
    code, _, told, calls = cloud('tpu_vm.sh', command, *TPU, '--type=v5litepod-8')
    assert code == 2 and 'set --yes' in told and told.count('\n') == 1
    assert all('describe' in call for call in calls)
  code, _, told, calls = cloud('gke.sh', 'delete', '--name=r18')
  assert code == 2 and 'set --yes' in told and not calls


def test_on_a_host_the_run_starts_once_saves_when_stopped_and_tells_its_code(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  python = tmp_path / 'instdisc' / 'bin' / 'python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/bash\nprintf "%s|" "$@"; trap "echo saved; exit 75" TERM\n'
                    'while :; do sleep 0.05; done\n')
  python.chmod(0o755)
  on_host = lambda *words: subprocess.run(['bash', LAUNCH / 'on_host.sh', *words], text=True,
                                          capture_output=True, timeout=60).stdout
  log = tmp_path / 'run.log'

  def wait_for(words, answer):
    end = time.monotonic() + 30
    while words not in answer() and time.monotonic() < end:
      time.sleep(0.05)
    assert words in answer()

  assert on_host('start', '--workdir=a b') == ''
  wait_for('|--workdir=a b|', log.read_text)
  assert on_host('start', '--workdir=c') == 'it runs already\n'
  assert on_host('code') == ''
  on_host('stop')
  wait_for('75', lambda: on_host('code'))
  assert log.read_text() == '-m|instdisc_jax.main|--distributed|--workdir=a b|saved\n'
  assert on_host('stop') == ''


GKE = ['run', '--name=r18', '--image=a/b:1', '--hosts=4']


@pytest.mark.parametrize('hardware, resource, chips, selector', [
    (['--tpu=tpu-v5-lite-podslice', '--topology=4x4'], 'google.com/tpu', 4,
     {'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
      'cloud.google.com/gke-tpu-topology': '4x4'}),
    (['--gpu=nvidia-h100-80gb'], 'nvidia.com/gpu', 8,
     {'cloud.google.com/gke-accelerator': 'nvidia-h100-80gb'})])
def test_a_jobset_is_filled_in_and_applied_once(cloud, hardware, resource, chips, selector):
  yaml = pytest.importorskip('yaml')
  arguments = [*GKE, *hardware, '--namespace=n', '--yes', '--', '--config=configs/fake.py',
               '--workdir=/b/"r 18"']
  code, _, _, calls = cloud('gke.sh', *arguments, bids=[['get jobset', [''], 1]])
  assert code == 0
  assert calls[0] == ['kubectl', 'get', 'jobset', 'r18', '--namespace=n']
  assert calls[1][:-1] == ['kubectl', 'apply', '--namespace=n', '-f', '-']
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
      '--workdir=/b/"r 18"']
  code, shown, _, calls = cloud('gke.sh', *arguments)  # kubectl finds it now
  assert code == 0 and 'is there already' in shown and len(calls) == 1
  code, shown, _, calls = cloud('gke.sh', *arguments[:arguments.index('--')], '--dry-run',
                                *arguments[arguments.index('--'):])
  first, _, rest = shown.partition('\n')
  assert code == 0 and not calls
  assert shlex.split(first) == ['kubectl', 'apply', '--namespace=n', '-f', '-']
  assert yaml.safe_load(rest) == jobset


SRUN = ['srun', '--kill-on-bad-exit=1', '--gpu-bind=none', 'python', '-m', 'instdisc_jax.main',
        '--distributed', '--config=c.py', '--workdir=/a b']


def test_slurm_starts_a_process_a_gpu_and_requeues_what_was_stopped(cloud, monkeypatch):
  code, shown, _, calls = cloud('slurm.sbatch', '--dry-run', *SRUN[-2:])
  assert code == 0 and shlex.split(shown) == SRUN and not calls
  monkeypatch.setenv('SLURM_JOB_ID', '17')
  for ended, later in ((0, []), (1, []), (75, [['scontrol', 'requeue', '17']])):
    code, _, _, calls = cloud('slurm.sbatch', *SRUN[-2:], bids=[['srun', [''], ended]])
    assert code == ended and calls == [SRUN, *later]


@pytest.mark.parametrize('script, arguments, words', [
    ('tpu_vm.sh', [], 'no command, must be create, setup,'),
    ('tpu_vm.sh', ['start', *TPU], "unknown command 'start', must be create, setup,"),
    ('tpu_vm.sh', ['create', '--zone=z'], 'no name: set --name=NAME'),
    ('tpu_vm.sh', ['create', '--name=n'], 'no zone: set --zone=ZONE'),
    ('tpu_vm.sh', ['create', *TPU], 'no type of TPU: set --type=TYPE'),
    ('tpu_vm.sh', ['create', *TPU, '--size=8'], "unknown argument '--size=8': see --help"),
    ('tpu_vm.sh', ['setup', '--name=n', '--zone=z'], 'nothing to install: set --source=ADDRESS'),
    ('tpu_vm.sh', ['setup', *TPU, '--configs=none'], "no folder 'none': set --configs"),
    ('tpu_vm.sh', ['setup', *TPU, '--data=bucket'], "--data is 'bucket', must be gs://"),
    ('tpu_vm.sh', ['run', *TPU], 'no arguments for instdisc_jax.main: put them after --'),
    ('tpu_vm.sh', ['all', *TPU, '--', '--workdir=/home/run'], 'set --workdir=gs://BUCKET/FOLDER'),
    ('gke.sh', ['run', '--name=R18'], "name is 'R18', must be lower-case letters"),
    ('gke.sh', ['run', '--name=r18'], 'no image: set --image=IMAGE'),
    ('gke.sh', GKE, 'no hardware: set --tpu=ACCELERATOR and --topology, or --gpu'),
    ('gke.sh', [*GKE, '--tpu=t'], 'no topology of the TPU: set --topology=TOPOLOGY'),
    ('gke.sh', [*GKE, '--gpu=g', '--hosts=0', '--', 'a'], "--hosts is '0', must be a number"),
    ('gke.sh', [*GKE, '--gpu=g'], 'no arguments for instdisc_jax.main: put them after --'),
    ('slurm.sbatch', [], 'no arguments for instdisc_jax.main'),
    ('slurm.sbatch', ['--config=c.py'], 'no workdir: set --workdir=DIR'),
    ('slurm.sbatch', ['--workdir=/a'], 'this is no Slurm job: start it with sbatch')])
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
