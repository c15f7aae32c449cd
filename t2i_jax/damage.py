"""What is wrong with a checkpoint that cannot be read or written, in one line."""

from collections.abc import Iterator
import contextlib
import gc
import sys
import traceback

import jax

from t2i_jax.errors import UserError

# What TensorStore says where a checkpoint may well be good, but cannot be had.
_ELSEWHERE = ("ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED")
_ELSEWHERE += ("UNAUTHENTICATED", "UNAVAILABLE")
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
