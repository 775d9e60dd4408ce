"""Addresses of stores as output_dir."""

from pathlib import Path

import pytest

from raysl.folder.address import (
    below,
    check_output_dir,
    is_address,
    path_or_address,
)


def test_an_address_is_told_from_a_path() -> None:
    assert all(map(is_address, ["s3://b/x", "gs://b", "abfs://c@a.dfs.core.windows.net/x"]))
    assert not any(map(is_address, ["runs", "/runs", "~/runs", "a:b", Path("s3://b/x"), None]))
    assert path_or_address("s3://b/x") == "s3://b/x"
    assert path_or_address("runs/x") == Path("runs/x")
    assert below("s3://b/x/", "y") == "s3://b/x/y"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("runs", "runs"),
        ("s3://bucket/runs/", "s3://bucket/runs"),
        ("gs://anonymous@bucket/runs", "gs://anonymous@bucket/runs"),
        ("abfs://box@name.dfs.core.windows.net/runs", "abfs://box@name.dfs.core.windows.net/runs"),
        ("hdfs://user@host:8020/runs", "hdfs://user@host:8020/runs"),
        ("file:///home/a%20b/runs", "/home/a b/runs"),
    ],
)
def test_what_is_allowed(given: str, kept: str) -> None:
    assert check_output_dir(given) == kept


@pytest.mark.parametrize(
    "given",
    [
        "s3://key:hidden@bucket/runs",
        "s3://bucket/runs?access_key=key&secret_key=hidden",
        "az://box/runs?sig=hidden",
    ],
)
def test_a_password_is_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as caught:
        check_output_dir(given)
    assert "hidden" not in str(caught.value)
    assert "key:" not in str(caught.value)


def test_an_address_without_a_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/FOLDER"):
        check_output_dir("s3://")
