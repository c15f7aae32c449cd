"""Errors that a user can mend: their message is shown as it is, without a traceback."""


class UserError(Exception):
    """Says what is wrong, where, and what to do."""


class ConfigError(UserError, ValueError):
    """A config or command line that cannot work."""


class MissingError(UserError, FileNotFoundError):
    """A file that a command needs is not there."""
