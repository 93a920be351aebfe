import os
import pathlib
import subprocess
import sys

import pytest

from instdisc_jax import __main__ as commands
from instdisc_jax import cli

PACKAGE = pathlib.Path(commands.__file__).parent


def test_every_command_is_listed_with_its_meaning(capsys):
  found = {path.stem for path in PACKAGE.glob('*.py')
           if "__name__ == '__main__'" in path.read_text()}
  assert found - {'__main__'} == set(commands.COMMANDS)
  assert commands.main([]) == 0
  listed = capsys.readouterr().out
  for name in commands.COMMANDS:
    assert f'  {name:10} ' in listed
  assert 'classify   Classifies all images of a folder' in listed


def test_a_command_is_run_with_its_arguments(capsys):
  assert commands.main(['embed', '--workdir=w', '--images=i', '--output=a.txt']) == 2
  assert "--output is 'a.txt', must be a file that ends in .npz or" in capsys.readouterr().err


def test_an_unknown_command_is_a_user_error(capsys):
  assert commands.main(['retrive', '--workdir=w']) == 2
  assert capsys.readouterr().err == ("error: unknown command 'retrive', perhaps meant as "
                                     "'retrieve': see --help for all commands\n")


@pytest.mark.slow
def test_the_script_is_installed():
  script = pathlib.Path(sys.executable).with_name('instdisc')
  done = subprocess.run([script, '--help'], capture_output=True, text=True, check=True)
  assert done.stdout.startswith('usage: instdisc COMMAND')


def test_a_tilde_in_an_argument_is_the_home_folder(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  parser = cli.make_parser('main', '', '')
  cli.add_workdir(parser, '')
  args, rest = parser.parse_known_args(
      ['--workdir=~/runs', '--config.dataset.name=folder:~/images', '--config.model.init=a~b'])
  assert args.workdir == os.path.join('/home/me', 'runs')
  assert rest == ['--config.dataset.name=folder:/home/me/images', '--config.model.init=a~b']


def test_a_start_from_a_run_is_configured_like_it(trained, capsys):
  overrides = [f'--config.model.init={trained[0]}', '--config.model.width=16']
  config = cli.as_the_start(cli.read_config('configs/digits.py', overrides), overrides)
  assert (config.model.name, config.model.embedding_dim) == ('resnet10_cifar', 16)
  assert config.model.width == 16 and config.batch_size == 128
  assert f"as in '{trained[0]}': " in (said := capsys.readouterr().out)
  assert 'model.name=resnet10_cifar' in said and 'model.width' not in said
