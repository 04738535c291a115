"""Whether a part that a recipe names can be had at all, found out once and within seconds.

transformers' loaders ask an unreachable hub again and again, for each file of a model, which takes minutes on every rank.
"""

import functools
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from ..errors import UserError

TIMEOUT_S = 5
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")
"""A model's or a tokenizer's folder has one of these."""
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of all that the hub's HTTP client raises, whichever client it is in this release; answers with an error are
`HfHubHTTPError`s."""


def hub_options(key: str, source: str) -> dict[str, Any]:
    """Keywords for transformers' loaders of `source`, a folder or hub id: what is in the cache is enough if the hub is out of reach.

    Args:
        key: of the recipe, for messages.

    Raises:
        UserError: neither a folder, nor in the cache, nor to be had from the hub.
    """
    if Path(source).exists():
        return {}
    problem = _problem(source)
    if not problem:
        return {}
    if _is_cached(source):
        return {"local_files_only": True}
    raise UserError(f"{key}: {source} is no folder here, and {problem}")


def _is_cached(source):
    try:
        return any(isinstance(try_to_load_from_cache(source, name), str) for name in FILES)
    except HFValidationError:
        return False


@functools.lru_cache(maxsize=64)
def _problem(source):
    """Why the hub does not give this model, as the end of a sentence; empty where it does."""
    try:
        url = hf_hub_url(source, FILES[0])
        get_hf_file_metadata(url, timeout=TIMEOUT_S, headers=build_hf_headers())
    except HFValidationError:
        return "no hub id either (OWNER/MODEL); check the path"
    except OfflineModeIsEnabled:
        return (
            "HF_HUB_OFFLINE forbids asking the hub; load it into the cache beforehand (hf download), or name its folder"
        )
    except EntryNotFoundError:
        return ""  # a repository without this one file
    except RepositoryNotFoundError:
        return (
            "the hub has no model of this name that may be read: check its spelling; of a gated or private one accept its "
            "terms and log in (hf auth login)"
        )
    except HfHubHTTPError:
        return ""  # the hub is there and has a problem of its own, for which transformers waits
    except (TRANSPORT_ERROR, OSError) as error:
        return (
            f"the hub {constants.ENDPOINT} cannot be reached ({type(error).__name__} within {TIMEOUT_S} s); load it into the cache "
            "beforehand (hf download), or name its folder"
        )
    return ""
