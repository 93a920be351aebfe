"""The two ways a command ends badly, each with one line for the reader and no traceback."""


class UserError(Exception):
  """A mistake in what was asked for: names the value found, the value required and the setting."""


class RunError(Exception):
  """The run itself failed, e.g. a non-finite loss or a full disk."""
