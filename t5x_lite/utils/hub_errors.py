# SPDX-License-Identifier: Apache-2.0
"""Errors of huggingface_hub as one sentence each, with the remedy."""

import contextlib
import urllib.parse
from collections.abc import Generator
from typing import Any

from t5x_lite.utils import exit_status
from t5x_lite.utils.hub_names import HubName

# Libraries that huggingface_hub has spoken HTTP with; their errors are of classes of their own.
HTTP_LIBRARIES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


class HubError(ValueError):
    """A name of the hub cannot be read; the message says why, and what can be done."""


class HubUnreachable(HubError):
    """The hub does not answer, and the cache does not have what is wanted."""

    exit_status = exit_status.FAILURE


@contextlib.contextmanager
def hub_errors(name: HubName) -> Generator[None]:
    """Turns errors of huggingface_hub into one sentence about a name, with the remedy.

    Messages of the library are left out: they have addresses with what a user put into them.
    """
    try:
        yield
    except Exception as error:
        described = describe_hub_error(name, error)
        if described is None:
            raise
        raise described from error


def describe_hub_error(name: HubName, error: Exception) -> HubError | None:
    """The error to raise in place of one of huggingface_hub; None for an error of another kind."""
    from huggingface_hub import errors, get_token

    token = get_token() is not None
    match error:
        case errors.GatedRepoError():
            log_in = (
                "with the account of the token in use"
                if token
                else "then log in (hf auth login, or HF_TOKEN in the environment)"
            )
            return HubError(f"{name} is gated: accept its terms at {page_address(name)}, {log_in}")
        case errors.RevisionNotFoundError():
            return HubError(f"{name.repo} has no revision {name.revision} on the hub")
        case errors.RepositoryNotFoundError():
            access = "the token in use may not read it" if token else "log in: hf auth login"
            return HubError(
                f"There is no {name.repo} here and no {name.kind} of that name on the hub (if it "
                f"is private, {access})"
            )
        case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
            return HubError(f"{name} has no such file on the hub")
        case errors.HfHubHTTPError():
            return describe_status(name, error.response.status_code)
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return describe_hub_error(name, error.__cause__)  # of an upload
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError) or (
        library in HTTP_LIBRARIES
    ):
        cause = type(error.__cause__ or error).__name__
        return HubUnreachable(
            f"There is no {name} here, and {endpoint()} cannot be reached ({cause})"
        )
    if isinstance(error, OSError) and error.errno is None:  # a length that is not as announced
        return HubUnreachable(f"The download of {name} was cut off: the same command goes on")
    return None


def describe_status(name: HubName, status: int) -> HubError:
    """The error for an answer of the hub that has no class of its own."""
    if status in (401, 403):
        return HubError(
            f"The hub refuses {name} to the token in use (status {status}): log in again "
            "(hf auth login), or take HF_TOKEN out of the environment"
        )
    return HubUnreachable(f"The hub answered status {status} for {name}: try again later")


def page_address(name: HubName) -> str:
    """Address of the page of a model or a dataset."""
    return f"{endpoint()}/{'datasets/' if name.kind == 'dataset' else ''}{name.repo}"


def endpoint() -> str:
    """Address of the hub, without a user's name and password."""
    from huggingface_hub import constants

    parts: Any = urllib.parse.urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
