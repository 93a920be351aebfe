import os
import pickle

import pytest

from instdisc_jax import convert


class _Hostile:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


@pytest.mark.slow
@pytest.mark.parametrize('zip_format', [True, False])
def test_a_hostile_pickle_is_refused_by_name_and_never_executed(
    tmp_path, torch, capsys, zip_format):
  file = tmp_path / 'hostile.pth'
  torch.save({'state_dict': _Hostile(tmp_path / 'created')}, file,
             _use_new_zipfile_serialization=zip_format)
  assert convert.main([f'--from={file}', f'--workdir={tmp_path}/run']) == 2
  assert 'it asks for posix.system' in capsys.readouterr().err
  file.write_bytes(pickle.dumps(_Hostile(tmp_path / 'created'), protocol=2))
  assert convert.main([f'--from={file}', f'--workdir={tmp_path}/run']) == 2
  assert sorted(p.name for p in tmp_path.iterdir()) == ['hostile.pth']
