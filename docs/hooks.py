"""What the site takes from the code while it is built, so that no page repeats it by hand.

A line of its own in a page is replaced:

    <!-- commands -->       a section for each command of the package, from its argument parser
    <!-- settings -->       every setting, from `config.SETTINGS`
    <!-- help: SCRIPT -->   what a script prints for --help

Files outside docs/ that are pages or figures of the site are added (`_ADDED`), and LaTeX between
dollar signs becomes a drawing, which needs no script and no font in the browser.
"""

import argparse
import html
import importlib
import logging
import pathlib
import re
import subprocess
import textwrap
from unittest import mock

from matplotlib import font_manager, textpath
from matplotlib import path as path_lib
from mkdocs.structure import files as files_lib

from instdisc_jax import config as config_lib

_LOG = logging.getLogger('mkdocs.hooks')
_ROOT = pathlib.Path(__file__).parents[1]
_ADDED = {'changelog.md': 'CHANGELOG.md', 'contributing.md': 'CONTRIBUTING.md'}
_WIDE = 'errors.md', 'parity.md', 'scale.md'  # large tables, which take the place of the contents
_GROUPS = {'': 'The run', 'dataset': 'Data', 'model': 'Encoder', 'loss': 'Loss',
           'bank': 'Memory bank', 'optimizer': 'Optimizer', 'augment': 'Augmentation',
           'knn': 'kNN during training', 'checkpoint': 'Checkpoints'}
# matplotlib's path codes in SVG.
_LETTERS = {path_lib.Path.MOVETO: 'M', path_lib.Path.LINETO: 'L', path_lib.Path.CURVE3: 'Q',
            path_lib.Path.CURVE4: 'C'}


def on_files(files, config):
  """Adds the files that lie outside docs/."""
  for name, source in _ADDED.items():
    files.append(files_lib.File.generated(config, name, abs_src_path=str(_ROOT / source)))
  return files


def on_page_markdown(markdown, page, **_):
  """Fills in what comes from the code, and warns of tests that do not exist."""
  if page.file.src_uri in _WIDE:
    page.meta['hide'] = ['toc']
  if page.file.src_uri in _ADDED:  # its links are those of the repository's root
    markdown = markdown.replace('](docs/', '](')
    for name, source in _ADDED.items():
      markdown = markdown.replace(f']({source})', f']({name})')
  markdown = re.sub(r'^<!-- help: (\S+) -->$', lambda found: _script_help(found[1]), markdown,
                    flags=re.M)
  for file, test in re.findall(r'`(tests/[\w/]+\.py)(?:::(\w+))?`', markdown):
    if not (_ROOT / file).exists() or f'def {test}' not in (_ROOT / file).read_text():
      _LOG.warning(f"{page.file.src_uri}: there is no test '{file}::{test}'")
  for name, make in (('commands', _commands), ('settings', _settings)):
    if f'<!-- {name} -->' in markdown:
      markdown = markdown.replace(f'<!-- {name} -->', make())
  return markdown


def on_post_build(config, **_):
  """Warns of modules that no page of the Python API documents, which a strict build refuses."""
  pages = ''.join(page.read_text() for page in (_ROOT / 'docs/reference/python').glob('*.md'))
  documented = set(re.findall(r'^::: (\S+)$', pages, re.M))
  for file in sorted((_ROOT / 'instdisc_jax').rglob('*.py')):
    text = file.read_text()
    module = '.'.join(file.relative_to(_ROOT).with_suffix('').parts).removesuffix('.__init__')
    if text.count('\ndef ') + text.count('\nclass ') and module not in documented and (
        "__name__ == '__main__'" not in text and module != 'instdisc_jax'):
      _LOG.warning(f"No page of docs/reference/python documents '{module}'")


def on_page_content(page_html, **_):
  """LaTeX, as pymdownx.arithmatex marks it, -> SVG; marks code that is one short word."""
  for tag, opening, closing in (('span', r'\(', r'\)'), ('div', r'\[', r'\]')):
    page_html = re.sub(
        rf'<{tag} class="arithmatex">{re.escape(opening)}(.*?){re.escape(closing)}</{tag}>',
        lambda found, tag=tag: f'<{tag} class="math">{_equation(found[1])}</{tag}>',
        page_html, flags=re.S)
  return re.sub(r'<code>(\S{1,36})</code>', r'<code class="word">\1</code>', page_html)


def _equation(escaped):
  """An inline SVG of an equation, drawn by matplotlib, in the color of the text around it."""
  latex = ' '.join(html.unescape(escaped).split())
  font = font_manager.FontProperties(math_fontfamily='stix')
  path = textpath.TextPath((0, 0), f'${latex}$', size=100, prop=font)  # 100 units are an em
  box = path.get_extents()
  parts = ['Z' if code == path_lib.Path.CLOSEPOLY else
           _LETTERS[code] + ' '.join(f'{x:.0f} {-y:.0f}' for x, y in points.reshape(-1, 2))
           for points, code in path.iter_segments(curves=True, simplify=False)]
  return (f'<svg role="img" aria-label="{html.escape(latex)}" '
          f'viewBox="{box.x0:.0f} {-box.y1:.0f} {box.width:.0f} {box.height:.0f}" '
          f'style="width:{box.width / 100:.2f}em;height:{box.height / 100:.2f}em;'
          f'vertical-align:{box.y0 / 100:.2f}em"><path d="{"".join(parts)}"/></svg>')


def _script_help(script):
  done = subprocess.run(['bash', script, '--help'], cwd=_ROOT, check=True, text=True,
                        capture_output=True)
  return _plain(done.stdout)


def _plain(text):
  """A block of plain text, without a button to copy it."""
  return f'``` {{.text .no-copy}}\n{textwrap.dedent(text.rstrip())}\n```'


def _commands():
  """A section for each command, the usual ones first."""
  return '\n\n'.join(map(_command, importlib.import_module('instdisc_jax.__main__').COMMANDS))


def _command(name):
  """A command's section: what it does, its usage and its options."""
  parser = _parser(name)
  usage = parser.format_usage().removeprefix('usage: ').strip()
  parts = [f'## {name}', _description(parser.description), _plain(usage)]
  for group in parser._action_groups:
    options = [action for action in group._group_actions if action.dest != 'help']
    if options and group.title not in ('options', 'positional arguments'):
      parts.append(f'**{group.title[0].upper()}{group.title[1:]}.** {group.description or ""}')
    parts += [_option(parser, action) for action in options]
  if parser.epilog and '--config.' in parser.epilog:
    parts.append('[Settings](settings.md) has every `--config.KEY=VALUE`.')
  elif parser.epilog:
    parts.append(_description(parser.epilog))
  return '\n\n'.join(parts)


def _parser(name):
  """The `ArgumentParser` of a command, caught when it is about to print its help."""
  caught = []
  module = importlib.import_module(f'instdisc_jax.{name}')
  with mock.patch.object(argparse.ArgumentParser, 'print_help',
                         lambda self, file=None: caught.append(self)):
    try:
      module.main(['--help'])
    except SystemExit:
      pass
  return caught[0]


def _description(text):
  """Paragraphs as they are, indented blocks fenced."""
  blocks = re.split(r'\n\s*\n', textwrap.dedent(text.strip('\n')))
  return '\n\n'.join(_plain(block) if block.startswith('    ') else block for block in blocks)


def _option(parser, action):
  """An entry of a definition list."""
  name = action.option_strings[-1]
  value = action.metavar or (f'{{{",".join(action.choices)}}}' if action.choices else '')
  values = vars(action) | {'prog': parser.prog}
  return f'`{name}{"=" * bool(value)}{value}`\n:   {_sentence((action.help or "") % values)}'


def _settings():
  """Every setting, by its part of the configuration."""
  parts = []
  for group, title in _grouped():
    parts.append(f'## {title}')
    parts += map(_setting, group)
  return '\n\n'.join(parts)


def _grouped():
  groups = {}
  for setting in config_lib.SETTINGS:
    groups.setdefault(setting.key.rpartition('.')[0], []).append(setting)
  return [(group, _GROUPS.get(prefix, prefix)) for prefix, group in groups.items()]


def _setting(setting):
  """An entry of a definition list, with an anchor of the setting's name."""
  facts = [f'Default: `{setting.default}`.']
  if setting.requirement:
    facts.append(f'Allowed: {setting.requirement}.')
  if setting.changeable:
    facts.append('May change when a run resumes.')
  return (f'`{setting.key}`{{ #{setting.key} }}\n'
          f':   {_sentence(setting.meaning)}  \n    {" ".join(facts)}')


def _sentence(text):
  """With a capital, unless it begins with a list of values, and a full stop."""
  text = ' '.join(text.split()).removesuffix('.')
  first = text.partition(' ')[0]
  return (text if first.endswith(',') else text[:1].upper() + text[1:]) + '.' * bool(text)
