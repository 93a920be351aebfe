import numpy as np
from PIL import Image

from instdisc_jax import preview


def test_a_row_for_each_image_with_eight_different_views(tmp_path, capsys):
  for i in range(3):
    coarse = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path = tmp_path / 'images' / f'{i}.png'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(coarse).resize((60 + i, 50)).save(path)
  output = tmp_path / 'sheet.png'
  assert preview.main([f'--images={tmp_path / "images"}', f'--output={output}']) == 0
  assert capsys.readouterr().out.startswith(f'{output}: left as evaluation sees an image, ')
  with Image.open(output) as image:
    heading, sheet = np.split(np.asarray(image).astype(int), [20])
  assert (heading[:, :100] < 100).any() and (heading[:, 230:330] < 100).any()
  assert sheet.shape == (3 * 228 - 4, 9 * 228 + 4, 3)
  cells = [[sheet[row * 228:row * 228 + 224, left:left + 224]
            for left in (0, *range(232, 2056, 228))] for row in range(3)]
  for row in cells:
    assert len(row) == 9
    for i, cell in enumerate(row):
      assert cell.std() > 5  # an image, not a blank
      assert all(np.abs(cell - other).mean() > 2 for other in row[:i])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['images', 'sheet.png']


def test_a_single_image_is_enough_and_two_views_change_nothing(tmp_path):
  (tmp_path / 'images').mkdir()
  Image.new('RGB', (50, 40), 'red').save(tmp_path / 'images' / '1.png')
  for more in ([], ['--config=configs/cifar10_plus.py']):
    assert preview.main([f'--images={tmp_path / "images"}', f'--output={tmp_path / "a.png"}',
                         *more]) == 0
