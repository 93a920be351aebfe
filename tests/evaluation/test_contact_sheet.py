import numpy as np
from PIL import Image

from instdisc_jax import cli, preview
from instdisc_jax import config as config_lib
from instdisc_jax.data import folder
from instdisc_jax.evaluation import contact_sheet


def test_a_row_for_each_image_with_eight_different_views(tmp_path, capsys):
  for i in range(3):
    coarse = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path = tmp_path / 'images' / f'{i}.png'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(coarse).resize((60 + i, 50)).save(path)
  output = tmp_path / 'sheet.png'
  assert preview.main([f'--images={tmp_path / "images"}', f'--output={output}',
                       '--config.augment.size=224']) == 0
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


def test_views_are_those_of_training_by_the_recipe_for_folders_shown_larger(tmp_path):
  for i in range(8):
    noise = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    path = tmp_path / 'images' / f'{i}.png'
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(noise).resize((48, 36)).save(path)
  output = tmp_path / 'sheet.png'
  assert preview.main([f'--images={tmp_path / "images"}', f'--output={output}']) == 0
  with Image.open(output) as image:
    sheet = np.asarray(image)[20:]
  assert sheet.shape == (8 * 100 - 4, 9 * 100 + 4, 3)
  recipe = config_lib.fill(cli.read_config('configs/folder.py', []), 8, on_cpu=True)
  assert recipe.augment.crop_scale == (0.4, 1.0)
  images = folder.load(tmp_path / 'images', 'error')[0]
  expected = contact_sheet._draw_views(images, np.arange(8), recipe)
  for row in range(8):
    np.testing.assert_array_equal(sheet[row * 100:row * 100 + 96:3, :96:3], images.central(row, 32))
    for col in range(8):
      left = (col + 1) * 100 + 4
      cell = sheet[row * 100:row * 100 + 96, left:left + 96]
      np.testing.assert_array_equal(cell[::3, ::3], expected[row, col])
      np.testing.assert_array_equal(cell[1::3, 2::3], expected[row, col])


def test_a_single_image_is_enough_and_two_views_change_nothing(tmp_path):
  (tmp_path / 'images').mkdir()
  Image.new('RGB', (50, 40), 'red').save(tmp_path / 'images' / '1.png')
  for more in ([], ['--config=configs/cifar10_plus.py']):
    assert preview.main([f'--images={tmp_path / "images"}', f'--output={tmp_path / "a.png"}',
                         *more]) == 0
