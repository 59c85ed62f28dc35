"""Errors that are the user's to mend: one line that names thing and mend; exit code 2."""


class UserError(ValueError):
  """Base of every error that an entry point prints as one line instead of a traceback."""


class DataError(UserError):
  """A dataset, picture, tokenizer or record cannot be used."""


class CheckpointError(UserError):
  """A checkpoint or a work directory cannot be used."""
