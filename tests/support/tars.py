"""Samples of tars, read without the package."""

import io
import tarfile

import fsspec
from webdataset.tariterators import base_plus_ext


def read_members(url, start, end):
    """Members of the sample in a byte range, {extension: bytes}."""
    with fsspec.open(url, "rb") as file:
        file.seek(start)
        content = io.BytesIO(file.read(end - start) + bytes(1024))
    with tarfile.open(fileobj=content, mode="r:", encoding="utf-8") as tar:
        return {
            ending.lower(): tar.extractfile(member).read()
            for member in tar
            if member.isfile() and (ending := base_plus_ext(member.name)[1]) is not None
        }
