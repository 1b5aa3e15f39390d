"""Both calls in a CUDA graph: replays read the weights and add to the gradients where they lie."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from stepping import BACKENDS, CALLS, FORMS, Model

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def capture(model: Model, call: str, warm: int = 2) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one step, and R as each replay leaves it. The gradients that exist hold the sum of the warm steps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            model.step(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = model.step(call)
    return graph, value


def compare(model: Model, call: str, graph: torch.cuda.CUDAGraph, value: Tensor) -> None:
    """A replay with the weights as they are now, beside the step itself."""
    found = []
    for replayed in (True, False):
        for parameter in model.trained():
            assert parameter.grad is not None
            parameter.grad.zero_()
        if replayed:
            graph.replay()
            found.append([value.clone(), *model.gradients()])
        else:
            found.append([model.step(call), *model.gradients()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and bool(one.any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_replay_does_what_the_step_does(
    call: str, backend: str, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    model = Model(form, dtype, device, backend)
    model.give_gradients()
    graph, value = capture(model, call)
    pointers = [parameter.grad.data_ptr() for parameter in model.trained() if parameter.grad is not None]
    before = None
    for _ in range(3):
        model.move()
        compare(model, call, graph, value)
        assert before is None or not torch.equal(before, value), "the same R for other weights"
        before = value.clone()
    assert pointers == [parameter.grad.data_ptr() for parameter in model.trained() if parameter.grad is not None]


@pytest.mark.parametrize("call", CALLS)
def test_gradients_that_the_capture_made_are_written_at_each_replay(call: str, device: torch.device) -> None:
    model = Model("base", torch.bfloat16, device, "triton")
    model.step(call)
    for parameter in model.trained():
        parameter.grad = None
    graph, _ = capture(model, call, warm=0)
    model.move()
    for _ in range(2):
        graph.replay()
    twice = model.gradients()
    for parameter in model.trained():
        parameter.grad = None
    model.step(call)
    assert all(torch.equal(one, other) for one, other in zip(twice, model.gradients(), strict=True))


def test_replays_survive_what_happens_after_the_capture(device: torch.device) -> None:
    # Host memory that the graph reads, and device memory that it has given back, must not become another's.
    model = Model("base", torch.bfloat16, device, "triton")
    model.give_gradients()
    graph, value = capture(model, "accumulate")
    others = [Model("base", torch.float32, device, "triton") for _ in range(3)]
    for turn in range(20):
        for other in others:
            other.give_gradients()
            other.step("accumulate", 0.1 + turn)
    del others
    gc.collect()
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(16)]
    hosts = [torch.full((1 << 12,), -1, dtype=torch.int64).pin_memory() for _ in range(64)]
    compare(model, "accumulate", graph, value)
    assert len(junk) + len(hosts) == 80


def test_two_graphs_and_steps_between_them(device: torch.device) -> None:
    models = [Model(form, torch.bfloat16, device, "triton") for form in ("base", "block")]
    for model in models:
        model.give_gradients()
    graphs = [capture(model, "accumulate") for model in models]
    for _ in range(3):
        for model, (graph, value) in zip(models, graphs, strict=True):
            model.move()
            compare(model, "accumulate", graph, value)


def test_a_whole_training_step_is_captured(device: torch.device) -> None:
    """Forward, backward, penalty and update in one graph, beside the same loop without one."""

    def loss_of(model: Model, batch: Tensor) -> Tensor:
        outputs = [batch[:, : weight.shape[0]].to(weight.dtype) @ weight for weight in model.parameters()]
        return torch.stack([output.float().square().mean() for output in outputs]).sum()

    def step(model: Model, batch: Tensor) -> None:
        for parameter in model.trained():
            assert parameter.grad is not None
            parameter.grad.zero_()
        loss_of(model, batch).backward()
        model.step("accumulate", 1e-2)
        with torch.no_grad():
            for parameter in model.trained():
                assert parameter.grad is not None
                parameter.sub_(1e-2 * parameter.grad)

    torch.manual_seed(5)
    batches = torch.randn(6, 16, 1000, device=device)
    ends = []
    for with_graph in (False, True):
        torch.manual_seed(7)
        model = Model("base", torch.bfloat16, device, "triton")
        model.give_gradients()
        batch = batches[0].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(model, batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if with_graph:
            with torch.cuda.graph(graph):
                step(model, batch)
        for i in range(len(batches)):
            batch.copy_(batches[i])
            if with_graph:
                graph.replay()
            else:
                step(model, batch)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
