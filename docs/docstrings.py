"""Reads docstrings as this project writes them, for the pages of the Python API."""

import ast
import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
  """Gives griffe what it would otherwise have to guess."""

  def on_module_instance(self, *, node: Any, mod: griffe.Module, **_: Any) -> None:
    """Keeps the indentation of a docstring that has nothing but a block after its first line."""
    if isinstance(node, ast.Module) and mod.docstring is not None:
      mod.docstring.value = ast.get_docstring(node, clean=False).strip()

  def on_function(self, *, func: griffe.Function, **_: Any) -> None:
    """Writes a result's type into its description, which may have a colon of its own."""
    if func.docstring is not None and func.returns is not None:
      func.docstring.value = re.sub(
          r'^(Returns|Yields):\n( +)', lambda found: f'{found[0]}{_item(func, found[1])}: ',
          func.docstring.value, count=1, flags=re.M)


def _item(func, section):
  """The type of what a function returns, or of the items that it yields."""
  annotation = str(func.returns)
  items = re.fullmatch(r'(?:Iterator|Generator|Iterable)\[(.*)\]', annotation)
  return items[1] if section == 'Yields' and items else annotation
