"""The entry point: run a kernel's PTX on memory of this process."""

import itertools
import warnings
from functools import lru_cache

import numpy as np

from .errors import PtxError
from .machine import Machine
from .memory import GlobalMemory, Region, strided_region
from .parser import TYPE_SIZE, parse
from .program import Program
from .stats import Stats

# Of one CTA, by architecture.
MAX_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def region_of(x, name, unwritten=False):
    """The region of a NumPy array or torch CPU tensor; None for an empty one.

    ``unwritten``: it holds nothing yet, so that reads before writes are errors.
    """
    if hasattr(x, "data_ptr"):
        if x.device.type != "cpu":
            raise ValueError(f"{name}: got a tensor on {x.device}, expected one on the CPU")
        es = x.element_size()
        return strided_region(x.data_ptr(), x.shape, [s * es for s in x.stride()], es, name, True, x, unwritten)
    a = x.__array_interface__["data"][0]
    return strided_region(a, x.shape, x.strides, x.itemsize, name, x.flags.writeable, x, unwritten)


@lru_cache(maxsize=32)
def _prepared(ptx):
    """What is the same in every launch of a kernel; the blocks of the program hold more while it runs."""
    module = parse(ptx)
    (fn,) = module.entries.values()
    return module, Program(fn)


def address_of(x):
    """What a kernel is given for an argument: the address of an array or a tensor, an integer as it is."""
    if hasattr(x, "data_ptr"):
        return x.data_ptr()
    return x.__array_interface__["data"][0] if isinstance(x, np.ndarray) else int(x)


def run(
    ptx, grid, args, num_warps, shared_bytes, *, memory=None, races=True, wgmma_registers=True, max_steps=5_000_000,
    order="forward",
):  # fmt: skip
    """Run the entry function of a PTX module -> Stats. Arrays and tensors are used in place.

    args             one per .param: array or tensor (pointer) or int
    memory           what the kernel may reach beside ``args``, through pointers found in memory; it keeps track of what
                     was written from launch to launch
    races            detect races between the warps of a CTA in shared memory
    wgmma_registers  a wgmma's accumulators and A registers must be left alone until a wgmma.wait_group covers it
    max_steps        basic blocks a CTA may execute
    order            of the CTAs, and of warps that go on by themselves: "forward", "reverse" or "random" (the same at
                     every call; loads may then land before somebody needs them)
    """
    module, program = _prepared(ptx)
    fn = program.fn
    grid = tuple(int(g) for g in grid) + (1,) * (3 - len(grid))
    threads = 32 * num_warps
    block = (threads, 1, 1)
    if fn.reqntid:
        n = fn.reqntid[0] * fn.reqntid[1] * fn.reqntid[2]
        if n != threads:
            raise ValueError(f"num_warps: got {num_warps}, expected {n // 32}, for {fn.name} requires {n} threads")
        block = fn.reqntid
    arch = int("".join(ch for ch in module.target if ch.isdigit()))
    limit = MAX_SHARED.get(arch, 227 * 1024)
    if shared_bytes > limit:
        raise PtxError(f"{shared_bytes} bytes of shared memory, sm_{arch} has {limit} per CTA")
    if len(args) != len(fn.params):
        raise ValueError(f"args: got {len(args)}, expected {len(fn.params)}, the parameters of {fn.name}")

    memory = GlobalMemory() if memory is None else memory
    memory.begin_launch()
    for i, x in enumerate(args):
        if not isinstance(x, int):
            memory.add_new(region_of(x, f"argument {i}"))
    # The parameter block is host memory too, for cvta.param.
    param_offsets, top = {}, 0
    for p in fn.params:
        top = -(-top // max(p.align, 1)) * max(p.align, 1)
        param_offsets[p.name] = top
        top += TYPE_SIZE[p.type]
    raw = np.zeros(top + 256, np.uint8)
    block_at = -raw.ctypes.data % 128
    for p, x in zip(fn.params, args, strict=True):
        size = TYPE_SIZE[p.type]
        value = (address_of(x) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        raw[block_at + param_offsets[p.name] :][:size] = np.frombuffer(value, np.uint8)
    param_base = raw.ctypes.data + block_at
    parameters = Region(param_base, max(top, 1), "kernel parameters", False, None, raw)
    memory.add(parameters)
    module_addresses = {}
    for v in module.variables.values():
        if v.space in ("global", "const"):
            raise NotImplementedError(f"PTX variable not supported: {v.name} in .{v.space}")

    stats = Stats()
    opts = {
        "block": block, "grid": grid, "shared_bytes": shared_bytes, "races": races, "wgmma_registers": wgmma_registers,
        "max_steps": max_steps, "module_addresses": module_addresses, "param_offsets": param_offsets,
        "param_base": param_base, "order": order,
    }  # fmt: skip
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            m = Machine(module, program, threads, shared_bytes, memory, opts)
            ctas = [(x, y, z) for z, y, x in itertools.product(*(range(g) for g in grid[::-1]))]
            numbered = list(enumerate(ctas))
            if order == "reverse":
                numbered.reverse()
            elif order == "random":
                np.random.default_rng(len(numbered)).shuffle(numbered)
            for number, cta in numbered:
                m.run_cta(cta, number)
    finally:
        memory.remove(parameters)
        for b in program.blocks:
            b.full = b.masked = b.sync = None
    stats.ctas = len(ctas)
    stats.hazards = [ins.text() for ins in m.hazards]
    for b in program.blocks:
        for op, n in b.histogram.items():
            if b.warps:
                stats.instructions[op] += n * b.warps
    return stats
