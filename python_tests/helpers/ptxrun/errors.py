"""Exceptions raised by the emulator."""


class PtxError(Exception):
    """Base class: something a real GPU would fault on, or that makes the kernel's result undefined."""


class ParseError(PtxError):
    """The PTX text could not be understood."""


class MemoryFault(PtxError):
    """Out-of-bounds or misaligned access, or a write to a read-only buffer."""


class UninitialisedRead(PtxError):
    """A register or a byte of memory was read before anything was written to it, or while an asynchronous copy into it
    was still in flight (missing wait)."""


class RaceError(PtxError):
    """Two warps (or CTAs) touched the same location, one of them writing, with no synchronisation between."""


class RegisterHazard(PtxError):
    """A register of a wgmma that is still in flight was accessed: no wgmma.wait_group has covered that wgmma yet."""


class Deadlock(PtxError):
    """No warp can make progress, or the instruction budget ran out."""
