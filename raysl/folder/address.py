"""Addresses of object stores as ``output_dir``, such as ``s3://bucket/runs``."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_ADDRESS = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_FILE = "file://"


def is_address(place: object) -> bool:
    """Return whether a text names a place in a store (``SCHEME://...``) rather than a path."""
    return isinstance(place, str) and bool(_ADDRESS.match(place))


def path_or_address(text: str) -> Path | str:
    """Return an argument of the command line as a path; an address stays a text.

    ``Path`` would join the two slashes of an address.
    """
    return text if is_address(text) else Path(text)


def below(address: str, *names: str) -> str:
    """Return the address of something below an address."""
    return "/".join([address.rstrip("/"), *names])


def check_output_dir(value: str) -> str:
    """Return ``output_dir``; ``file://`` becomes a path.

    Raises:
        ValueError: If it is an address with a password or with settings in it, or without a place
            in the store. The message does not repeat the secret.
    """
    if not is_address(value):
        return value
    if value.startswith(_FILE):
        return unquote(value.removeprefix(_FILE))
    scheme, _, rest = value.partition("://")
    place, user = rest.rpartition("@")[2], rest.rpartition("@")[0]
    if ":" in user or "?" in rest:
        where = f"{scheme}://{'***@' if user else ''}{place.partition('?')[0]}"
        raise ValueError(
            f"{where}: an address must hold neither a password nor settings, because config.yaml "
            f"and MLflow keep it. Give credentials, region and endpoint by the environment "
            f"(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, "
            f"GOOGLE_APPLICATION_CREDENTIALS, AZURE_CLIENT_ID, ...) or the store's usual files, on "
            f"every node"
        )
    if not urlsplit(value).netloc:
        raise ValueError(f"{value}: names no bucket; write {scheme}://BUCKET/FOLDER")
    return value.rstrip("/")
