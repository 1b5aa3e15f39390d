"""A GPU that is not there: tensors in the host's memory that say that they lie on ``cuda:0``, and every call that would
wait for a GPU, or that a CUDA graph could not capture, written down.

Operators run on the CPU, and the package's own run their real bodies, so that results can be compared. What is
captured can be replayed: every operator and every kernel again, in order, with whatever the memory holds then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from rpsft_kernels.evaluation import plan
from rpsft_kernels.ops import products, torch_ops
from rpsft_kernels.ops.selftest import gate
from rpsft_kernels.ops.triton import backend as triton_backend
from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton import jit, upload
from rpsft_kernels.ops.triton import launch as triton_launch

DEVICE = torch.device("cuda", 0)
_BODIES: dict[Any, Callable[..., Any]] = {
    torch.ops.rpsft_kernels.project_drift.default: torch_ops._run_project_drift,
    torch.ops.rpsft_kernels.pull_back.default: torch_ops._run_pull_back,
    torch.ops.rpsft_kernels.pull_back_.default: torch_ops._run_pull_back_,
}
_MM_DTYPE = getattr(torch.ops.aten.mm, "dtype", None)


def _multiply(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    return one.to(dtype) @ other.to(dtype)


# Operators that the CPU lacks, with functions that compute them.
_FOR_GPUS_ALONE: dict[Any, Callable[..., Any]] = {} if _MM_DTYPE is None else {_MM_DTYPE: _multiply}
_WAITING_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class OnGpu(Tensor):
    """A tensor on the stand-in. For autograd it lies on the CPU, which has a thread for its backward pass."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> OnGpu:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, requires_grad=requires_grad
        )

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the stand-in's mode")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass

    # torch would make no copy here, as the tensor lies on the CPU for it.
    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        devices = [torch.device(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device))]
        if any(device.type == "cpu" for device in devices):
            StandIn.current().waits.append("to: from the GPU")
            return self.inner.clone()
        return super().to(*args, **kwargs)

    # These look into the memory without an operator.
    def tolist(self) -> Any:
        StandIn.current().waits.append("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        StandIn.current().waits.append("numpy")
        return self.inner.numpy()


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


class StandIn(TorchDispatchMode):
    """The device. ``waits`` lists what would have waited, ``refused`` what no capture allows, ``own`` the package's own
    operators, which serve what could not be prepared.
    """

    _entered: ClassVar[list[StandIn]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.refused: list[str] = []
        self.operators: list[str] = []
        self.own: list[str] = []
        self.capturing = False
        self._graph: list[Callable[[], None]] = []
        self._held: list[Any] = []
        self._pinned: list[Tensor] = []

    @staticmethod
    def current() -> StandIn:
        return StandIn._entered[-1]

    @contextmanager
    def running(self) -> Iterator[StandIn]:
        """Operators of the ``with`` block see the device. (Fake tensors' mode is what lets torch name a CUDA device
        without CUDA; nothing gets as far as that.)"""
        StandIn._entered.append(self)
        try:
            with FakeTensorMode(), self:
                yield self
        finally:
            StandIn._entered.pop()

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.capturing, self._graph = True, []
        try:
            yield
        finally:
            self.capturing = False

    def replay(self) -> None:
        with _disable_current_modes(), torch.no_grad():
            for step in self._graph:
                step()

    def launch(self, run: Callable[[], None]) -> None:
        """A kernel of the package's own."""
        with _disable_current_modes(), torch.no_grad():
            run()
        if self.capturing:
            self._graph.append(run)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _BODIES:
            self.own.append(str(func))
            with self:
                return _BODIES[func](*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # Within an operator's body these come here whole; what they are made of is what is judged.
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(leaf, OnGpu) for leaf in given)
        target = kwargs.get("device")
        there = here if target is None else torch.device(target).type == "cuda"
        self._judge(func, given, args, kwargs, here, there)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        pinned = kwargs.pop("pin_memory", False)
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        func = _FOR_GPUS_ALONE.get(func, func)
        with _disable_current_modes():
            result = func(*inner_args, **inner_kwargs)
            if pinned:
                self._pinned.append(result)
            # An operator in place returns what it was given.
            known = {id(leaf.inner): leaf for leaf in given if isinstance(leaf, OnGpu)}

            def shown(value: Any) -> Any:
                if id(value) in known:
                    return known[id(value)]
                return OnGpu(value) if there and isinstance(value, Tensor) else value

            outside = tree_map(shown, result)
        if self.capturing and (here or there):
            # A graph keeps its memory. Each tensor here has some of its own, which no other is given.
            self._held.append(result)
            if not func.__name__.startswith(("empty", "new_empty")):
                self._graph.append(lambda: _again(func, inner_args, inner_kwargs, result))
        return outside

    def _judge(
        self, func: Any, given: Sequence[Tensor], args: Any, kwargs: dict[str, Any], here: bool, there: bool
    ) -> None:
        name = str(func)
        if here or there:
            self.operators.append(name)
        if here and any(tag in func.tags for tag in _WAITING_TAGS):
            self.waits.append(name)
        if here and not there:
            self.waits.append(f"{name}: from the GPU")
        host = [leaf for leaf in given if not isinstance(leaf, OnGpu)]
        copies = name in ("aten._to_copy.default", "aten.copy_.default")
        if copies and there and host:
            queued = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not queued or not self._is_pinned(host[0]):
                self.waits.append(f"{name}: to the GPU, from pageable memory or at once")
            if not isinstance(args[0], OnGpu) and name == "aten.copy_.default":
                self.waits.append(f"{name}: from the GPU")
        elif here and any(leaf.ndim for leaf in host):
            self.waits.append(f"{name}: of tensors of the CPU")
        if self.capturing and kwargs.get("pin_memory"):
            self.refused.append(f"{name}: pinned memory")

    def _is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage().data_ptr()
        return any(storage == pinned.untyped_storage().data_ptr() for pinned in self._pinned)


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Run an operator into the memory that it has filled before."""
    for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The device with everything that the package asks of one. Kernels run in Triton's interpreter."""
    device = StandIn()
    for name, value in (("_uploads", type(upload._uploads)()), ("_replayed", {}), ("_cached_bytes", 0)):
        monkeypatch.setattr(upload, name, value)
    monkeypatch.setattr(upload, "_reserve", upload._CaptureReserve())
    interpreter = triton_device.Profile("interpreter", 3, False)
    monkeypatch.setattr(triton_device, "device_profile", lambda _: interpreter)
    monkeypatch.setattr(triton_launch, "find_start", _starter(device))
    monkeypatch.setattr(triton_backend, "unavailable", lambda device, dtype: None)
    # Fake tensors' mode is on for the sake of the device's name alone: these have memory.
    monkeypatch.setattr(plan, "is_traced", lambda: False)
    # A device that has passed its self-test is not tested again.
    monkeypatch.setattr(gate, "_passed", {DEVICE})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: _Stream(device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: device.waits.append("synchronize"))
    products.machine.cache_clear()
    yield device
    products.machine.cache_clear()


class _Stream(SimpleNamespace):
    def __init__(self, device: StandIn) -> None:
        super().__init__(device=device, cuda_stream=0)

    def record_event(self) -> object:
        if self.device.capturing:
            self.device.refused.append("record_event")
        return object()

    def synchronize(self) -> None:
        self.device.waits.append("synchronize")


def _starter(device: StandIn) -> Callable[..., Callable[[], None]]:
    cpu = torch.device("cpu")

    def find_start(
        variant: Any, programs: int, where: torch.device, arguments: tuple[Tensor, ...]
    ) -> Callable[[], None]:
        assert where == DEVICE and all(isinstance(argument, OnGpu) for argument in arguments)
        start = jit.bind_jit(variant, programs, cpu, tuple(map(_inner, arguments)))
        return lambda: device.launch(start)

    return find_start
