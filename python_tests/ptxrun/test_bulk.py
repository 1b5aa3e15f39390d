"""Copies of the bulk-copy engine: what they move, what must be waited for, and what must stay as it is until then."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ptxrun import GlobalMemory, PtxError, RaceError, UninitialisedRead, region_of
from ptxrun.handwritten import kernel
from ptxrun.tensormap import tensor_map

Array = npt.NDArray[Any]
BFLOAT16 = 10  # a tensor map's element type: of its size, NumPy has uint16
ELEMENT = {"u1": 0, "u2": BFLOAT16, "f2": 6, "f4": 7, "f8": 9}

# Shared memory: a box at 0, another at 2048, mbarriers from 4096 on, a tensor map at 5120.
SHARED = 8192
# %r1: the thread; %r2: its 16 bytes of the box; %p1: it is thread 0, %p2: it is in warp 0, %p3: in warp 1.
START = """mov.u32 %r1, %tid.x; mov.u32 %r3, smem; shl.b32 %r2, %r1, 4; add.s32 %r2, %r2, %r3;
 setp.eq.u32 %p1, %r1, 0; setp.lt.u32 %p2, %r1, 32; shr.u32 %r4, %r1, 5; setp.eq.u32 %p3, %r4, 1;
 setp.eq.u32 %p4, %r1, 32; mov.b32 %r5, 0;
"""
FENCE = " fence.proxy.async.shared::cta;\n"
SYNC = " bar.sync 0;\n"
COMMIT = " cp.async.bulk.commit_group;\n"
# The image in parameter 1 goes to the box, 16 bytes a thread.
FILL = """ ld.param.u64 %d1, [p1]; mad.wide.u32 %d1, %r1, 16, %d1; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d1];
 st.shared.v4.b32 [%r2], {%r10, %r11, %r12, %r13};
"""
BARRIERS = "".join(
    f" @%p1 mbarrier.init.shared.b64 [%r3+{4096 + 8 * i}], 1;\n" for i in range(2)
) + " bar.sync 0; ld.param.u64 %d5, [p0];\n"  # fmt: skip


def wait(n: int, read: bool = False) -> str:
    return f" cp.async.bulk.wait_group{'.read' if read else ''} {n};\n"


def store(box: int = 0, guard: str = "@%p1", tensor: str = "%d5", x: str = "%r5", y: str = "%r5") -> str:
    """Thread 0 stores a box to (x, y) of the tensor of the map at ``tensor``."""
    return f""" add.s32 %r6, %r3, {box}; ld.param.u64 %d5, [p0];
 {guard} cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [{tensor}, {{{x}, {y}}}], [%r6];
"""


def load(nbytes: int, box: int = 0, barrier: int = 0, guard: str = "@%p1", tensor: str = "%d5") -> str:
    """Thread 0 loads a box and arrives for it."""
    copy = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f""" add.s32 %r6, %r3, {box}; add.s32 %r7, %r3, {4096 + 8 * barrier};
 {guard} mbarrier.arrive.expect_tx.shared.b64 _, [%r7], {nbytes};
 {guard} {copy} [%r6], [{tensor}, {{%r5, %r5}}], [%r7];
"""


def wait_for_load(barrier: int = 0, parity: int = 0, guard: str = "", name: str = "w") -> str:
    """Wait for a phase of an mbarrier, or where ``guard`` holds."""
    skip = f"@!{guard} bra skip_{name};" if guard else ""
    return f""" {skip}
{name}: mbarrier.try_wait.parity.shared.b64 %p9, [%r3+{4096 + 8 * barrier}], {parity}; @!%p9 bra {name};
skip_{name}:
"""


def described(array: Array, box: tuple[int, int], swizzle: int = 0) -> Array:
    """A tensor map of a matrix, in memory that is aligned as it must be."""
    raw = np.zeros(256, np.uint8)
    descriptor = raw[-raw.ctypes.data % 128 :][:128]
    strides = [s // array.itemsize for s in array.strides]
    kind = ELEMENT[array.dtype.str[1:]]
    descriptor[:] = np.frombuffer(tensor_map(array.ctypes.data, kind, array.shape, strides, box, swizzle), np.uint8)
    return descriptor


def launch(body: str, array: Array, box: tuple[int, int], *more: Array, swizzle: int = 0, **options: Any) -> None:
    """Run a body with parameters: the tensor map of ``array``, an image of 2048 bytes, and more."""
    memory = GlobalMemory()
    memory.add(region_of(array, "tensor"))
    arguments = [described(array, box, swizzle), *more]
    if not more:
        arguments.append(np.arange(512, dtype=np.int32))
    kernel(
        START + body + " ret;", arguments, threads=128, shared=SHARED, target="sm_90a", memory=memory, **options
    )  # fmt: skip


def matrix(rows: int, cols: int, dtype: str, pitch: int = 256) -> tuple[Array, Array]:
    """Rows that lie ``pitch`` bytes apart, filled with small numbers; and all of that memory, with 16 bytes around."""
    size = np.dtype(dtype).itemsize
    raw = np.zeros(rows * pitch + 64, np.uint8)
    frame = raw[-raw.ctypes.data % 16 :][: rows * pitch + 32]
    whole = frame.view(dtype)
    whole[:] = (np.arange(len(whole)) % 97 + 1).astype(dtype)
    return whole[16 // size :][: rows * pitch // size].reshape(rows, -1)[:, :cols], whole


def image_of(values: Array, swizzle: int) -> Array:
    """2048 bytes of shared memory that hold a box: 16-byte pieces permuted within every eight lines of 128 bytes."""
    dense = np.zeros(2048, np.uint8)
    raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    dense[: len(raw)] = raw
    image = np.zeros_like(dense)
    for piece in range(128):
        line, column = divmod(piece, 8)
        column ^= line & (1 << swizzle) - 1
        image[(line * 8 + column) * 16 :][:16] = dense[piece * 16 :][:16]
    return image


# -- what they move -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "box", "swizzle"),
    [
        ("u1", (16, 16), 0),
        ("u1", (16, 128), 3),
        ("u2", (32, 8), 0),
        ("u2", (16, 16), 1),
        ("f2", (16, 32), 2),
        ("u2", (16, 64), 3),
        ("f4", (16, 32), 3),
        ("f4", (24, 16), 2),
        ("f4", (40, 12), 3),
        ("f8", (16, 16), 3),
    ],
)
@pytest.mark.parametrize(
    ("x", "y"), [(0, 0), (5, 3), (-3, -2), (8, 8), (1000, 0), (0, -1000)]
)  # fmt: skip
def test_boxes(dtype: str, box: tuple[int, int], swizzle: int, x: int, y: int) -> None:
    """A store writes what lies inside the tensor and nothing else; a load reads zeros elsewhere."""
    rows, cols = box
    tensor, whole = matrix(20, 13, dtype)
    before, expected = whole.copy(), matrix(20, 13, dtype)
    values = (np.arange(rows * cols) % 89 + 100).astype(dtype).reshape(box)
    inside = np.zeros(box, dtype)
    for i in range(rows):
        for j in range(cols):
            if 0 <= y + i < 20 and 0 <= x + j < 13:
                inside[i, j] = tensor[y + i, x + j]
                expected[0][y + i, x + j] = values[i, j]

    read = np.zeros(2048, np.uint8)
    place = f" mov.b32 %r5, {x}; mov.b32 %r8, {y};"
    body = BARRIERS + place + load(rows * cols * tensor.itemsize).replace("{%r5, %r5}", "{%r5, %r8}") + wait_for_load()
    body += f"""setp.lt.u32 %p5, %r1, {rows * cols * tensor.itemsize // 16};
 @%p5 ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r2];
 ld.param.u64 %d1, [p1]; mad.wide.u32 %d1, %r1, 16, %d1; @%p5 st.global.v4.b32 [%d1], {{%r10, %r11, %r12, %r13}};"""
    launch(body, tensor, box, read, swizzle=swizzle)
    assert (read == image_of(inside, swizzle)).all()
    assert (whole == before).all()

    body = FILL + FENCE + SYNC + place + store(y="%r8") + COMMIT + wait(0)
    launch(body, tensor, box, image_of(values, swizzle), swizzle=swizzle)
    assert (whole == expected[1]).all()


def test_what_a_load_may_not_read() -> None:
    tensor, _ = matrix(16, 8, "f4")
    memory = GlobalMemory()
    memory.add(region_of(tensor, "tensor", unwritten=True))
    body = START + BARRIERS + load(16 * 32) + wait_for_load() + "ret;"
    with pytest.raises(UninitialisedRead, match="to which nothing was written"):
        kernel(body, [described(tensor, (16, 8))], shared=SHARED, target="sm_90a", memory=memory)


# -- waits ----------------------------------------------------------------------------------------------------


def stored(body: str, **options: Any) -> Array:
    """A store of a box (16, 32) in float32, of 2048 bytes that hold 0, 1, 2, ..; then ``body``."""
    tensor, _ = matrix(16, 32, "f4", 128)
    tensor[:] = -1
    launch(FILL + FENCE + SYNC + store() + body, tensor, (16, 32), np.arange(512, dtype=np.float32), **options)
    return tensor.reshape(-1)


@pytest.mark.parametrize("end", ["", COMMIT, wait(0), COMMIT + wait(1), COMMIT + "@!%p1 bra e;" + wait(0) + "e:"])
def test_a_store_is_waited_for(end: str) -> None:
    """By the thread that began it, and committed before."""
    for read in (False, True):
        if end.endswith("e:"):
            assert (stored(end.replace("group 0", "group.read 0" if read else "group 0")) == np.arange(512)).all()
        else:
            with pytest.raises(PtxError, match="exits with bulk stores that may not have read their source"):
                stored(end.replace("wait_group", "wait_group.read") if read else end)


def test_another_thread_cannot_wait_for_it() -> None:
    with pytest.raises(PtxError, match="may not have read their source"):
        stored(COMMIT + "@%p1 bra e;" + wait(0) + "e:")


OVERWRITE = " st.shared.b32 [%r2], 0;\n"


@pytest.mark.parametrize("read", [False, True])
def test_the_source_stays_until_the_wait(read: bool) -> None:
    assert (stored(COMMIT + wait(0, read) + SYNC + OVERWRITE) == np.arange(512)).all()
    for body in (OVERWRITE + COMMIT + wait(0, read), COMMIT + wait(1, read) + SYNC + OVERWRITE + wait(0, read)):
        with pytest.raises(RaceError, match="write to offset 0 by warp 0, read by warp 0"):
            stored(body)
        assert (stored(body, races=False)[::4] == 0).all()
    with pytest.raises(RaceError, match="by warp 1, read by warp 0"):
        stored(COMMIT + wait(0, read) + "@%p3" + OVERWRITE)  # warp 1 does not know that warp 0 waited
    with pytest.raises(RaceError, match="read by warp 0"):
        stored("ld.shared.b32 %r9, [%r2];" + OVERWRITE + COMMIT + wait(0))  # an ordinary read hides nothing


@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("box", [0, 512])
def test_groups_of_stores(n: int, box: int) -> None:
    """Two groups, of which the first reads the first box: wait_group n leaves the n newest in flight."""
    tensor, _ = matrix(4, 32, "f4", 128)
    body = FILL + FENCE + SYNC + store() + COMMIT + store(512) + COMMIT + wait(n, True) + SYNC
    body += f"@%p1 st.shared.b32 [%r3+{box}], 0;" + wait(0)
    if n == 0 or (n == 1 and box == 0):
        launch(body, tensor, (4, 32))
    else:
        with pytest.raises(RaceError, match="write to offset"):
            launch(body, tensor, (4, 32))


def test_a_store_writes_when_it_is_waited_for() -> None:
    """wait_group.read leaves the writing: another read may find what was there before."""
    tensor, _ = matrix(16, 32, "f4", 128)
    image, found = np.arange(512, dtype=np.float32), np.zeros(2, np.float32)
    body = FILL + FENCE + SYNC + store() + COMMIT + "ld.param.u64 %d2, [p2]; ld.param.u64 %d3, [p3];"
    for i, end in enumerate((wait(0, True), wait(0))):
        body += end + f"@%p1 ld.global.b32 %r9, [%d2+4]; @%p1 st.global.b32 [%d3+{4 * i}], %r9;"
    tensor[0, 1] = -5
    launch(body, tensor, (16, 32), image, tensor, found)
    assert found.tolist() == [-5, 1]
    assert (tensor.reshape(-1) == image).all()


# -- order ----------------------------------------------------------------------------------------------------


def test_ordinary_stores_need_a_proxy_fence() -> None:
    """Before a bulk store that reads them, and before a bulk load that overwrites them."""
    tensor, _ = matrix(16, 32, "f4", 128)
    end = COMMIT + wait(0)
    launch(FILL + FENCE + SYNC + store() + end, tensor, (16, 32))
    launch(FILL + SYNC + FENCE + store() + end, tensor, (16, 32))  # by the reader, once it knows of the stores
    for body in (FILL + SYNC, FENCE + FILL + SYNC, FILL + "@%p2" + FENCE + SYNC):
        with pytest.raises(RaceError, match="asynchronous read, without fence.proxy.async, of offset"):
            launch(body + store() + end, tensor, (16, 32))
    with pytest.raises(RaceError, match="asynchronous read of offset"):
        launch(FILL + FENCE + store() + end, tensor, (16, 32))

    end = load(2048) + wait_for_load()
    launch(FILL + FENCE + BARRIERS + end, tensor, (16, 32))
    with pytest.raises(RaceError, match="bulk load, without fence.proxy.async, to offset"):
        launch(FILL + BARRIERS + end, tensor, (16, 32))


READ = " ld.shared.b32 %r9, [%r3+{box}];\n"


def test_a_load_is_known_by_its_own_mbarrier() -> None:
    """Warps 0 and 1 wait for one load each: neither knows that the other one has landed."""
    tensor, _ = matrix(16, 32, "f4", 128)
    both = BARRIERS + load(2048) + load(2048, 2048, 1)
    each = wait_for_load(0, 0, "%p2", "a") + wait_for_load(1, 0, "%p3", "b")
    own = "@%p2" + READ.format(box=0) + "@%p3" + READ.format(box=2048)
    launch(both + each + own, tensor, (16, 32))
    launch(both + each + SYNC + READ.format(box=0) + READ.format(box=2048), tensor, (16, 32))
    with pytest.raises(RaceError, match="read of offset 0 by warp 1, written by a bulk load"):
        launch(both + each + "@%p3" + READ.format(box=0), tensor, (16, 32))
    with pytest.raises(UninitialisedRead, match="in flight"):
        launch(both + each + "@%p2" + READ.format(box=2048), tensor, (16, 32))


def test_the_engine_passes_no_knowledge_on() -> None:
    """Warp 1 reads a box and has the engine store it; warp 0, which knows nothing of that, loads over it."""
    tensor, _ = matrix(16, 32, "f4", 128)
    start = FILL + FENCE + BARRIERS + "@%p3" + READ.format(box=0) + store(0, "@%p4") + COMMIT + wait(0, True)
    launch(start + SYNC + load(2048) + wait_for_load(), tensor, (16, 32))
    with pytest.raises(RaceError, match="bulk load to offset 0 by warp 0, read by warp 1"):
        launch(start + load(2048) + wait_for_load(), tensor, (16, 32))


# -- tensor maps that the kernel writes -----------------------------------------------------------------------

# Warp 0 copies the map in parameter 0 to parameter 2, by way of shared memory, with another address: parameter 3.
WRITE = """ @!%p2 bra skip_{name};
 ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %r1, 4, %d1; ld.global.b32 %r9, [%d1];
 shl.b32 %r8, %r1, 2; add.s32 %r8, %r8, %r3; st.shared.b32 [%r8+5120], %r9; bar.warp.sync -1;
 ld.param.u64 %d2, [p3]; @%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r3+5120], %d2;
 bar.warp.sync -1; add.s32 %r8, %r3, 5120; ld.param.u64 %d6, [p2]; cvt.u64.u32 %d7, %r8;
 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d6], [%d7], 128;
skip_{name}:
"""
ACQUIRE = " ld.param.u64 %d6, [p2]; {guard} fence.proxy.tensormap::generic.acquire.gpu [%d6], 128;\n"
FIRST = WRITE.format(name="first") + ACQUIRE.format(guard="@%p2")
AGAIN = WRITE.format(name="again")


def with_written_map(body: str) -> Array:
    """A kernel that writes its tensor map, of the tensor that is returned."""
    original, _ = matrix(16, 32, "f4", 128)
    tensor, _ = matrix(16, 32, "f4", 128)
    tensor[:] = 7
    written = described(original, (16, 32))
    launch(FILL + FENCE + BARRIERS + body, original, (16, 32), np.arange(512, dtype=np.float32), written, tensor)
    return tensor.reshape(-1)


def test_a_written_tensor_map_is_used() -> None:
    found = with_written_map(FIRST + store(0, tensor="%d6") + COMMIT + wait(0))
    assert (found == np.arange(512)).all()


def test_a_written_tensor_map_is_acquired() -> None:
    """By the warp that uses it, or by one that is ordered before."""
    end = store(0, "@%p4", "%d6") + COMMIT + wait(0)
    acquire = ACQUIRE.format(guard="@%p3")
    for right in (FIRST + SYNC, WRITE.format(name="first") + SYNC + acquire):
        with_written_map(right + end)
    # No acquire; one that the user does not know of; one before the map is known to be written.
    for wrong in (WRITE.format(name="first") + SYNC, FIRST, acquire + WRITE.format(name="first") + SYNC):
        with pytest.raises(RaceError, match="with no fence.proxy.tensormap acquire known to warp 1"):
            with_written_map(wrong + " ld.param.u64 %d6, [p2];" + end)


def test_a_tensor_map_in_use_by_a_load_is_not_replaced() -> None:
    begin = FIRST + load(2048, 2048, tensor="%d6")
    with_written_map(begin + wait_for_load() + AGAIN)
    with_written_map(begin + wait_for_load(0, 0, "%p3") + SYNC + AGAIN)
    with pytest.raises(RaceError, match="replaced by warp 0 while a bulk load .* not waited for") as error:
        with_written_map(begin + AGAIN + wait_for_load())
    assert "that bulk load:" in str(error.value) and "complete_tx" in str(error.value)
    # Warp 1 waits; when warp 0 goes on, which waits for another load, this one has landed, too.
    other = load(2048, 0, 1) + wait_for_load(0, 0, "%p3", "a") + wait_for_load(1, 0, "%p2", "b")
    with_written_map(begin + other + SYNC + AGAIN)
    with pytest.raises(RaceError, match="replaced by warp 0 while a bulk load .* not known to this warp"):
        with_written_map(begin + other + AGAIN)


def test_a_tensor_map_in_use_by_a_store_is_not_replaced() -> None:
    begin = FIRST + store(0, tensor="%d6") + COMMIT
    for read in (False, True):
        with_written_map(begin + wait(0, read) + AGAIN)
        for end in (wait(1, read) + AGAIN + wait(0), AGAIN + wait(0)):
            with pytest.raises(RaceError, match="replaced by warp 0 while a bulk store .* not waited for"):
                with_written_map(begin + end)
    by_warp_1 = FIRST + SYNC + store(0, "@%p4", "%d6") + COMMIT + wait(0)
    with_written_map(by_warp_1 + SYNC + AGAIN)
    with pytest.raises(RaceError, match="replaced by warp 0 while a bulk store .* not known to this warp"):
        with_written_map(by_warp_1 + AGAIN)
