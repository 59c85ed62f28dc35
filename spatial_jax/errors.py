"""Errors that the user can fix: entry points print one line and exit with code 2."""

import errno
import os

# System errors that the machine causes, not the program, and what the user can do about them.
FIXES = {
  errno.ENOSPC: "free some space and run the same command again",
  errno.EDQUOT: "free some space and run the same command again",
  errno.EFBIG: "raise the limit of file sizes and run the same command again",
  errno.EROFS: "choose a folder that can be written",
  errno.EACCES: "check its permissions",
  errno.EPERM: "check its permissions",
  errno.EEXIST: "choose another folder",
  errno.ENOTDIR: "choose another folder",
  errno.EISDIR: "give a file",
  errno.ENAMETOOLONG: "choose a shorter name",
  errno.EIO: "check the disk",
  errno.ESTALE: "check that the network file system is mounted",
}


class UserError(ValueError):
  """Base of every error that an entry point prints as one line instead of a traceback."""


class DataError(UserError):
  """A dataset, image, tokenizer or record cannot be used."""


class CheckpointError(UserError):
  """A checkpoint or a work directory cannot be used."""


def system_error(error: OSError, path: str | os.PathLike[str] | None = None) -> UserError | None:
  """The one-line form of an error of the file system, None if the machine is not its cause.

  Args:
    error: raised by the operating system.
    path: the file or folder, if `error` does not name one.
  """
  if error.errno not in FIXES:
    return None
  place = error.filename or path
  name = f"{os.fspath(place)}: " if place is not None else ""
  return UserError(f"{name}{os.strerror(error.errno)}; {FIXES[error.errno]}")
