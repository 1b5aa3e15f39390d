"""The launcher's promises, checked over a stand-in for the driver, each in a process of its own.

``python launches.py <promise> <the compiled module> <the stand-in>``; ``test_launcher.py`` is the caller.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

KIB = 1 << 10
DYNAMIC_SHARED, CARVEOUT = 8, 9
PROMISES: dict[str, Callable[[Any, Stub], None]] = {}


class Stub:
    """``csrc/tests/cuda_stub.cpp``, loaded a second time beside the launcher: both see one library."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)

    def reset(self) -> None:
        self._library.stub_reset()

    def fail(self, call: str, code: int) -> None:
        self._library.stub_fail(call.encode(), code)

    def fail_ptx(self, code: int) -> None:
        self._library.stub_fail_ptx(code)

    def capture(self, whether: bool) -> None:
        self._library.stub_capture(int(whether))

    def capture_mode(self) -> int:
        """The mode of capture of this thread, 0 at first."""
        return int(self._library.stub_capture_mode())

    def meet(self, launches: int) -> None:
        self._library.stub_meet(launches)

    def log(self, *names: str) -> list[dict[str, Any]]:
        """The calls since the last reset, or those among them that have these names."""
        text = ctypes.create_string_buffer(self._library.stub_log(None, 0) + 1)
        self._library.stub_log(text, len(text))
        calls = [json.loads(line) for line in text.value.decode().splitlines()]
        return [call for call in calls if not names or call["call"] in names]

    def names(self) -> list[str]:
        return [call["call"] for call in self.log()]

    def stack(self) -> tuple[int, int]:
        """Return the number of contexts that this thread has pushed, and the current one's device, -1 without one."""
        return self._library.stub_depth(), self._library.stub_current()

    def push(self, device: int) -> None:
        """Makes a device's primary context current, as another library of the process would."""
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        assert self._library.cuInit(0) == 0
        assert self._library.cuDeviceGet(ctypes.byref(handle), device) == 0
        assert self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle) == 0
        assert self._library.cuCtxPushCurrent_v2(context) == 0


def promise(check: Callable[[Any, Stub], None]) -> Callable[[Any, Stub], None]:
    PROMISES[check.__name__] = check
    return check


def make(cuda: Any, image: str = "entry", shared: int = 0, layout: list[tuple[int, int]] | None = None) -> Any:
    return cuda.Kernel(image.encode(), "entry", "project(bfloat16)", 128, shared, layout or [])


def message(kind: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception as error:
        if type(error) is not kind:
            raise
        return str(error)
    raise AssertionError(f"no {kind.__name__} from {arguments}")


@promise
def arguments_are_packed_by_the_layout(cuda: Any, stub: Stub) -> None:
    # Out of order; a gap from 4 to 16, none between the two small ones, the end not a multiple of 8.
    layout = [(16, 8), (0, 4), (24, 2), (26, 1)]
    make(cuda, layout=layout).launch(0, 0, (1, 1, 1), [2**64 - 2, 7, 0xABCD, 0xFF])
    (launch,) = stub.log("cuLaunchKernel")
    expected = (
        (7).to_bytes(4, "little")
        + bytes(12)
        + (2**64 - 2).to_bytes(8, "little")
        + (0xABCD).to_bytes(2, "little")
        + b"\xff"
    )
    assert bytes.fromhex(launch["parameters"]) == expected, launch


@promise
def triton_kernels_get_their_pointers_in_order(cuda: Any, stub: Stub) -> None:
    layout = [(8 * i, 8) for i in range(7)]
    pointers = [0x7F00_0000_0000 + 256 * i for i in range(5)] + [0, 0]
    make(cuda, layout=layout).launch(device=1, stream=0, grid=(1, 1, 1), arguments=pointers)
    (launch,) = stub.log("cuLaunchKernel")
    assert bytes.fromhex(launch["parameters"]) == b"".join(p.to_bytes(8, "little") for p in pointers), launch


@promise
def the_launch_is_the_one_asked_for(cuda: Any, stub: Stub) -> None:
    kernel = cuda.Kernel(b"entry", "entry", "name", 256, 1234, [])
    for stream, grid in ((0, (1, 1, 1)), (0x5500_1234_5678, (132, 3, 2)), (2**64 - 1, (2**31 - 1, 1, 1))):
        stub.reset()
        kernel.launch(2, stream, grid, [])
        (launch,) = stub.log("cuLaunchKernel")
        assert (launch["device"], launch["stream"], tuple(launch["grid"])) == (2, stream, grid), launch
        assert (launch["block"], launch["shared"]) == ([256, 1, 1], 1234), launch


@promise
def an_empty_grid_does_nothing(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda, layout=[(0, 8)])
    for grid in ((0, 1, 1), (1, 0, 1), (5, 5, 0)):
        kernel.launch(0, 0, grid, [1])
        assert "arguments" in message(ValueError, kernel.launch, 0, 0, grid, []), "checked all the same"
    assert stub.log() == []


@promise
def wrong_arguments_are_value_errors(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda, layout=[(0, 8), (8, 4)])
    launches = {
        "arguments: got 1, expected 2": (0, 0, (1, 1, 1), [1]),
        "arguments: got 3, expected 2": (0, 0, (1, 1, 1), [1, 2, 3]),
        "argument 1: got 4294967296, which does not fit in 4 bytes": (0, 0, (1, 1, 1), [1, 2**32]),
        "grid: got x = -1, expected 0 to 2147483647": (0, 0, (-1, 1, 1), [1, 2]),
        "grid: got x = 2147483648": (0, 0, (2**31, 1, 1), [1, 2]),
        "grid: got z = 65536, expected 0 to 65535": (0, 0, (1, 1, 65536), [1, 2]),
        "device: got -1, expected 0 or more": (-1, 0, (1, 1, 1), [1, 2]),
    }
    for said, arguments in launches.items():
        found = message(ValueError, kernel.launch, *arguments)
        assert f"kernel 'project(bfloat16)': {said}" in found, found
    assert "device: got -1" in message(ValueError, kernel.resources, -1)
    kernels: dict[str, tuple[Any, ...]] = {
        "image: got no bytes": (b"", "entry", "n", 128, 0, []),
        "entry: got an empty name": (b"x", "", "n", 128, 0, []),
        "threads: got 0, expected 1 to 1024": (b"x", "entry", "n", 0, 0, []),
        "threads: got 1025": (b"x", "entry", "n", 1025, 0, []),
        "shared: got -1": (b"x", "entry", "n", 128, -1, []),
        "layout: got (0, 3), expected a size": (b"x", "entry", "n", 128, 0, [(0, 3)]),
        "layout: got (-8, 8), expected an offset inside": (b"x", "entry", "n", 128, 0, [(-8, 8)]),
        "layout: got (32764, 8), expected an offset inside": (b"x", "entry", "n", 128, 0, [(32764, 8)]),
        "layout: got (4, 8), expected an offset that is a multiple": (b"x", "entry", "n", 128, 0, [(4, 8)]),
        "layout: got (4, 4), which overlaps": (b"x", "entry", "n", 128, 0, [(4, 4), (0, 8)]),
    }
    for said, made_of in kernels.items():
        found = message(ValueError, cuda.Kernel, *made_of)
        assert f"kernel 'n': {said}" in found, found
    assert stub.log() == [], "nothing of this needs a driver"


@promise
def every_device_has_its_own_module_and_context(cuda: Any, stub: Stub) -> None:
    kernel, other = make(cuda), make(cuda, "entry of another")
    for device in (0, 2, 0, 1, 2, 2):
        kernel.launch(device, 0, (1, 1, 1), [])
        other.launch(device, 0, (1, 1, 1), [])
    assert stub.stack() == (0, -1)
    launches = stub.log("cuLaunchKernel")
    assert [call["device"] for call in launches] == [0, 0, 2, 2, 0, 0, 1, 1, 2, 2, 2, 2]
    assert all(call["result"] == 0 for call in launches)
    assert len({call["image"] for call in launches}) == 2
    assert sorted(call["device"] for call in stub.log("cuModuleLoadDataEx")) == [0, 0, 1, 1, 2, 2]
    assert sorted(call["device"] for call in stub.log("cuDevicePrimaryCtxRetain")) == [0, 1, 2]


@promise
def a_context_is_pushed_only_where_another_is_current(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda)
    kernel.launch(0, 0, (1, 1, 1), [])
    kernel.launch(1, 0, (1, 1, 1), [])
    stub.push(1)
    stub.reset()
    kernel.launch(1, 0, (1, 1, 1), [])
    assert stub.names() == ["cuCtxGetCurrent", "cuLaunchKernel"], stub.names()
    stub.reset()
    kernel.launch(0, 0, (1, 1, 1), [])
    around = ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert stub.names() == around, stub.names()
    assert stub.stack() == (1, 1)


@promise
def shared_memory_is_raised_only_where_it_must_be(cuda: Any, stub: Stub) -> None:
    cases = [
        ("entry", 0, []),
        ("entry", 48 * KIB, []),
        ("entry", 48 * KIB + 1, [(DYNAMIC_SHARED, 48 * KIB + 1), (CARVEOUT, 100)]),
        ("entry", 227 * KIB, [(DYNAMIC_SHARED, 227 * KIB), (CARVEOUT, 100)]),
        # The kernel's declared memory counts too: CUDA leaves the rest of 48 KiB.
        ("entry shared=1024", 47 * KIB, []),
        ("entry shared=1024", 47 * KIB + 16, [(DYNAMIC_SHARED, 47 * KIB + 16), (CARVEOUT, 100)]),
    ]
    for image, shared, expected in cases:
        stub.reset()
        kernel = make(cuda, image, shared)
        kernel.launch(0, 0, (1, 1, 1), [])
        kernel.launch(0, 0, (1, 1, 1), [])
        changes = [(call["attribute"], call["value"]) for call in stub.log("cuFuncSetAttribute")]
        assert changes == expected, (image, shared, changes)
        assert [call["shared"] for call in stub.log("cuLaunchKernel")] == [shared] * 2
    found = message(RuntimeError, make(cuda, shared=300 * KIB).launch, 0, 0, (1, 1, 1), [])
    assert "cuFuncSetAttribute" in found and "307200 bytes of dynamic shared memory" in found, found


@promise
def threads_load_once_per_device_and_launch_together(cuda: Any, stub: Stub) -> None:
    count = 8
    kernel = make(cuda, layout=[(0, 8)])
    failures: list[BaseException] = []
    # Nobody's launch ends before all have begun: neither the interpreter's lock nor one of the launcher is held.
    stub.meet(count)
    together = threading.Barrier(count)

    def work(number: int) -> None:
        try:
            together.wait()
            kernel.launch(number % 2, 0, (1, 1, 1), [number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert sorted(call["device"] for call in stub.log("cuModuleLoadDataEx")) == [0, 1]
    launches = stub.log("cuLaunchKernel")
    assert sorted(int.from_bytes(bytes.fromhex(call["parameters"]), "little") for call in launches) == list(
        range(count)
    )
    assert len({call["thread"] for call in launches}) == count


def a_failing_call_is_named_and_leaves_the_contexts(cuda: Any, stub: Stub, call: str) -> None:
    kernel = make(cuda, shared=100 * KIB)
    for other_context in (False, True):
        if other_context:
            stub.push(1)
        stack = stub.stack()
        stub.fail(call, 2)
        # A failure is not remembered: every attempt goes to the driver, and says the same.
        for _ in range(2):
            found = message(RuntimeError, kernel.launch, 2, 0, (1, 1, 1), [])
            # The device's name is the driver's to say: it cannot before it is initialized, and by this call alone.
            nameless = call == "cuDeviceGet" or (call == "cuInit" and not other_context)
            device = "CUDA device 2" if nameless else "CUDA device 2 (Stub GPU 2)"
            shown = f"{call.removesuffix('_v2')} failed with CUDA_ERROR_OUT_OF_MEMORY (2), out of memory"
            assert found.startswith(f"kernel 'project(bfloat16)' on {device}: {shown}"), found
            assert stub.stack() == stack
        stub.fail(call, 0)
    loads = [load for load in stub.log("cuModuleLoadDataEx") if load["result"] == 0]
    left = len(loads) - len(stub.log("cuModuleUnload"))
    assert left == (1 if call == "cuLaunchKernel" else 0), "half a load stays"
    kernel.launch(2, 0, (1, 1, 1), [])
    assert [launch["device"] for launch in stub.log("cuLaunchKernel") if launch["result"] == 0] == [2]
    assert stub.stack() == (1, 1)


# Every call of a first launch that needs more than the plain shared memory.
for name in (
    "cuInit",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent_v2",
    "cuThreadExchangeStreamCaptureMode",
    "cuModuleLoadDataEx",
    "cuModuleGetFunction",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuLaunchKernel",
):
    PROMISES[f"a_failing_{name}_is_named_and_leaves_the_contexts"] = partial(
        a_failing_call_is_named_and_leaves_the_contexts, call=name
    )


@promise
def a_failing_pop_is_reported(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda)
    kernel.resources(0)
    stub.fail("cuCtxPopCurrent_v2", 201)
    found = message(RuntimeError, kernel.launch, 0, 0, (1, 1, 1), [])
    assert ": cuCtxPopCurrent failed with CUDA_ERROR_INVALID_CONTEXT (201), invalid device context" in found, found


@promise
def a_load_that_failed_is_tried_again(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda)
    stub.fail("cuModuleLoadDataEx", 209)
    found = {message(cuda.LoadError, kernel.launch, 1, 0, (1, 1, 1), []) for _ in range(3)}
    assert found == {
        "kernel 'project(bfloat16)' on CUDA device 1 (Stub GPU 1): cuModuleLoadDataEx failed with "
        "CUDA_ERROR_NO_BINARY_FOR_GPU (209), no kernel image is available for execution on the device"
    }, found
    assert len(stub.log("cuModuleLoadDataEx")) == 3
    stub.fail("cuModuleLoadDataEx", 0)
    kernel.launch(1, 0, (1, 1, 1), [])
    kernel.launch(1, 0, (1, 1, 1), [])
    assert len(stub.log("cuModuleLoadDataEx")) == 4


@promise
def messages_carry_what_the_driver_cannot_say_in_a_code(cuda: Any, stub: Stub) -> None:
    found = message(cuda.LoadError, make(cuda, "bad entry").launch, 0, 0, (1, 1, 1), [])
    log = "ptxas application ptx input, line 1; fatal: no such instruction"
    assert found.endswith(f"CUDA_ERROR_INVALID_PTX (218), a PTX JIT compilation failed; {log}"), found
    found = message(RuntimeError, make(cuda, "image without it").launch, 0, 0, (1, 1, 1), [])
    assert found.endswith("CUDA_ERROR_NOT_FOUND (500), named symbol not found; entry 'entry'"), found
    stub.fail("cuLaunchKernel", 12345)
    found = message(RuntimeError, make(cuda).launch, 0, 0, (1, 1, 1), [])
    assert found.endswith("cuLaunchKernel failed with an unknown error (12345)"), found
    found = message(RuntimeError, make(cuda).launch, 7, 0, (1, 1, 1), [])
    assert "on CUDA device 7: cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE (101)" in found, found


@promise
def an_image_that_does_not_suit_is_an_error_of_its_own(cuda: Any, stub: Stub) -> None:
    assert issubclass(cuda.LoadError, RuntimeError)
    refusals = {
        200: "CUDA_ERROR_INVALID_IMAGE",
        209: "CUDA_ERROR_NO_BINARY_FOR_GPU",
        218: "CUDA_ERROR_INVALID_PTX",
        221: "CUDA_ERROR_JIT_COMPILER_NOT_FOUND",
        222: "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        223: "CUDA_ERROR_JIT_COMPILATION_DISABLED",
    }
    ptx = make(cuda, ".version 9.4 entry")
    for code, name in refusals.items():
        stub.fail_ptx(code)
        found = message(cuda.LoadError, ptx.launch, 0, 0, (1, 1, 1), [])
        assert f"on CUDA device 0 (Stub GPU 0): cuModuleLoadDataEx failed with {name} ({code}), " in found, found
        # Machine code of the same kernel is another matter.
        make(cuda).launch(0, 0, (1, 1, 1), [])
    stub.fail_ptx(0)
    # A driver that loads lazily finds out later.
    for call in ("cuModuleGetFunction", "cuFuncGetAttribute", "cuLaunchKernel"):
        stub.fail(call, 209)
        assert f"{call} failed with" in message(cuda.LoadError, make(cuda).launch, 0, 0, (1, 1, 1), [])
        stub.fail(call, 0)
    # An error that has nothing to do with the image is none of these.
    stub.fail("cuModuleLoadDataEx", 2)
    message(RuntimeError, make(cuda).launch, 0, 0, (1, 1, 1), [])


@promise
def a_first_launch_may_be_captured_into_a_graph(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda)
    stub.capture(True)
    kernel.launch(0, 7, (1, 1, 1), [])
    assert stub.capture_mode() == 0, "the thread's own mode is back"
    assert [call["mode"] for call in stub.log("cuThreadExchangeStreamCaptureMode")] == [2, 0]
    kernel.launch(0, 7, (1, 1, 1), [])
    assert len(stub.log("cuThreadExchangeStreamCaptureMode")) == 2, "only to load"
    assert [call["result"] for call in stub.log("cuLaunchKernel")] == [0, 0]
    # Any call in between may fail.
    for call in ("cuCtxPushCurrent_v2", "cuModuleLoadDataEx", "cuModuleGetFunction", "cuFuncGetAttribute"):
        stub.fail(call, 2)
        message(RuntimeError, make(cuda).launch, 0, 0, (1, 1, 1), [])
        assert stub.capture_mode() == 0, call
        stub.fail(call, 0)


@promise
def resources_are_the_drivers(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda, "entry registers=168 local=24 shared=512")
    assert kernel.resources(1) == (168, 24, 512)
    stub.reset()
    assert kernel.resources(1) == (168, 24, 512)
    assert stub.log() == [], "they are read when the kernel is loaded"
    kernel.launch(1, 0, (1, 1, 1), [])
    assert "cuModuleLoadDataEx" not in stub.names()


@promise
def modules_outlive_their_kernels(cuda: Any, stub: Stub) -> None:
    kernel = make(cuda)
    kernel.launch(0, 0, (1, 1, 1), [])
    del kernel
    gc.collect()
    assert "cuModuleUnload" not in stub.names()


@promise
def devices_are_described_without_a_context(cuda: Any, stub: Stub) -> None:
    assert cuda.driver_version() == 12040
    assert cuda.device_count() == 3
    assert [cuda.device_name(i) for i in range(3)] == ["Stub GPU 0", "Stub GPU 1", "Stub GPU 2"]
    assert cuda.compute_capability(1) == (9, 1)
    assert cuda.shared_memory_per_block(1) == 227 * KIB
    assert not stub.log("cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2")
    for call, function in {
        "cuDriverGetVersion": cuda.driver_version,
        "cuDeviceGetCount": cuda.device_count,
        "cuDeviceGetName": lambda: cuda.device_name(0),
        "cuDeviceGetAttribute": lambda: cuda.compute_capability(0),
    }.items():
        stub.fail(call, 3)
        found = message(RuntimeError, function)
        assert f"{call} failed with CUDA_ERROR_NOT_INITIALIZED (3), initialization error" in found, found
        stub.fail(call, 0)
    assert "CUDA_ERROR_INVALID_DEVICE" in message(RuntimeError, cuda.device_name, 3)
    stub.fail("cuInit", 100)
    assert cuda.device_count() == 0, "no GPU is an answer, not a failure"
    assert "CUDA_ERROR_NO_DEVICE" in message(RuntimeError, cuda.device_name, 0)


def load(path: str) -> Any:
    """The compiled module alone: importing the package would bring torch."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _, chosen, native, stand_in = sys.argv
    PROMISES[chosen](load(native).cuda, Stub(stand_in))
