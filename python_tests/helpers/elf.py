"""The libraries that a shared object asks for, read from its dynamic section: binutils need not be there."""

from __future__ import annotations

import struct

_DYNAMIC = 6
_NEEDED = 1


def needed_libraries(image: bytes) -> list[str]:
    """Return the libraries that a 64-bit little-endian ELF file needs."""
    assert image[:6] == b"\x7fELF\x02\x01"
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    # type, offset, size, link (the section of its strings)
    sections = [struct.unpack_from("<4xI16xQQI", image, table + index * size) for index in range(count)]
    names = []
    for kind, offset, length, link in sections:
        if kind != _DYNAMIC:
            continue
        strings = sections[link][1]
        for at in range(offset, offset + length, 16):
            tag, value = struct.unpack_from("<QQ", image, at)
            if tag == _NEEDED:
                start = strings + value
                names.append(image[start : image.index(b"\0", start)].decode())
    return names
