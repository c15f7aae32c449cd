"""Errors that a user can mend: their message is shown as it is, without a traceback."""

from collections.abc import Iterator
import contextlib


class UserError(Exception):
    """Says what is wrong, where, and what to do.

    Attributes:
      exit_code: of a command line that ends with it.
    """

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A config or command line that cannot work."""

    exit_code = 2


class MissingError(UserError, FileNotFoundError):
    """A file that a command needs is not there."""


@contextlib.contextmanager
def users_files() -> Iterator[None]:
    """What is wrong with files that the user gave is the user's to know, without a traceback."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
