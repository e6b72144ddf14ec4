"""Zip archives from anywhere."""

from __future__ import annotations

import zipfile


class Refused(ValueError):
    """What no honest file holds."""


def listed(file: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """The members of an archive of so many bytes.

    Raises:
        Refused: if they would unpack to many times that size, or if two could be taken for one.
    """
    members = [member for member in file.infolist() if not member.is_dir()]
    if sum(member.file_size for member in members) > 64 * 2**20 + 8 * size:
        raise Refused("its members unpack to many times its size")
    # torch looks names up without regard to case, and takes the first of several.
    if len({member.filename.casefold() for member in members}) != len(members):
        raise Refused("it has two members of one name")
    return members
