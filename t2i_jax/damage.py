"""What is wrong with a checkpoint that cannot be read or written, in one line."""

from collections.abc import Iterator
import contextlib
import functools
import gc
import logging
import sys
import traceback

import jax

from t2i_jax.errors import UserError

# What TensorStore says where a checkpoint may well be good, but cannot be had.
_ELSEWHERE = ("ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED")
_ELSEWHERE += ("UNAUTHENTICATED", "UNAVAILABLE")
_CLOSED = "Event loop is closed"  # asyncio's words
_LENGTH = 400  # characters of a reason: what failed comes first, why last


class DamagedError(UserError):
    """A checkpoint does not hold what was saved."""


class StorageError(UserError):
    """What a run has to write cannot be written."""


def reason_of(error: BaseException) -> str:
    """The first cause of an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = text.partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH // 2]} ... {text[-_LENGTH // 2 :]}"


def forget(error: BaseException | None) -> None:
    """Frees what an error holds. Orbax's coroutines complain once more then, and nobody hears."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
        gc.collect()
    finally:
        sys.unraisablehook = hook


@functools.cache
def tell_once() -> None:
    """From now on nothing is printed of the errors that orbax raises: a message tells them.

    It logs them as well; and of a tree that cannot be written, each array's task complains when it
    is deleted (asyncio), or when TensorStore wants to tell it that it has failed, too.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_of_orbax)
    hook = sys.unraisablehook

    def heard(raised):
        if not (isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == _CLOSED):
            hook(raised)

    sys.unraisablehook = heard


def _not_of_orbax(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR:
        return True
    said = [record.pathname, record.getMessage()]
    if record.exc_info and record.exc_info[2]:
        said += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
    return not any("orbax" in text for text in said)


@contextlib.contextmanager
def damage(name: str) -> Iterator[None]:
    """What reading raises is damage of `name`, but for memory, rights and the network."""
    reason = ""
    try:
        yield
    except (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = reason_of(error)
        if reason.startswith(_ELSEWHERE):
            raise
        forget(error)
    if reason:
        raise DamagedError(f"{name}: {reason}")
