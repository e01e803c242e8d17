# SPDX-License-Identifier: Apache-2.0
"""Exit statuses of the commands, by the error that ends them."""

import contextlib
from collections.abc import Callable, Generator

# The request is wrong: an unknown name, a missing file, values that contradict each other.
MISTAKE = 2
# The work failed, or a plan does not fit: another command line would not help.
FAILURE = 1
# Another process was lost (sysexits.h, EX_TEMPFAIL): the same command may succeed later.
TRY_AGAIN = 75

# Paths that the user named wrongly; other errors of the system are failures, such as a full disk.
WRONG_PATHS = FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError


class OutOfMemoryError(ValueError):
    """The device or the host has too little memory; the message says what takes less."""

    exit_status = FAILURE


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors by which Python and XLA report a lack of memory."""
    by_device = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return by_device or isinstance(error, MemoryError)


@contextlib.contextmanager
def naming_lack_of_memory(describe: Callable[[str], str]) -> Generator[None]:
    """Context in which a lack of memory is one sentence with remedies.

    Args:
      describe: function from the system's or the device's reason to that sentence.

    Raises:
      OutOfMemoryError: the device or the host has too little memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["the host has too little"])[0]
        raise OutOfMemoryError(describe(reason[:300])) from error


def exit_status(error: BaseException) -> int:
    """The exit status of a command that ends with `error`.

    A class of errors can define its status as an attribute `exit_status`.
    """
    status = getattr(error, "exit_status", None)
    if status is not None:
        return status
    mistake = isinstance(error, (ValueError, *WRONG_PATHS))
    return MISTAKE if mistake else FAILURE
