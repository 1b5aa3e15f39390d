"""The cases at every scale."""

from __future__ import annotations

import pytest
import torch

from benchmarks.reporting.results import SUITES, Suite
from benchmarks.suites import cases
from benchmarks.suites.cases import SCALES, Scale
from benchmarks.suites.providers import providers
from rpsft_kernels.tools.models import MODELS

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("scale", SCALES)
def test_cases_have_names_of_their_own_and_providers_that_exist(suite: Suite, scale: Scale) -> None:
    found = cases.select(suite, scale, CPU)
    assert found and len({case.name for case in found}) == len(found)
    names = {provider.name for provider in providers(CPU, torch.bfloat16, compiling=False)}
    for case in found:
        assert case.suite == suite and set(case.only) <= names
        assert (case.axis is None) == (case.x is None) == (suite != "scaling")
        # Some anchors of whole models are full, but never all: the products would have no rate.
        assert any(case.rank < min(shape) for shape in case.shapes)
        assert suite != "layer" or not case.only


@pytest.mark.parametrize("scale", SCALES)
def test_the_scaling_suite_varies_what_it_says(scale: Scale) -> None:
    by_axis = {"elements": lambda c: c.elements, "rank": lambda c: c.rank, "weights": lambda c: len(c.shapes)}
    found = cases.select("scaling", scale, CPU)
    assert {case.axis for case in found} == set(by_axis)
    for axis, value in by_axis.items():
        own = [case for case in found if case.axis == axis]
        assert [value(case) for case in own] == [case.x for case in own]
        assert len({case.x for case in own}) == len(own) >= 2
        for other in set(by_axis) - {axis, "elements"}:
            assert len({by_axis[other](case) for case in own}) == 1


def test_a_whole_model_is_the_model() -> None:
    for model, shape in MODELS.items():
        assert sorted(cases.model_shapes(model, shape.layers)) == sorted(shape.weights())


def test_as_many_layers_as_memory_holds() -> None:
    def layers(gib: float) -> int:
        return cases.fitting_layers("llama-3.1-8b", 768, torch.bfloat16, int(gib * GIB))

    assert layers(4) == 0 and 0 < layers(40) < layers(80) and layers(1000) == 32
    for gib in (40, 80):
        shapes = cases.model_shapes("llama-3.1-8b", layers(gib))
        assert cases.held_bytes(shapes, 768, torch.bfloat16) < gib * GIB


def test_without_memory_there_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "available_bytes", lambda device: 1 << 20)
    assert cases.select("model", "small", CPU) == []


def test_only_names_who_takes_part() -> None:
    case = cases.select("scaling", "smoke", CPU)[0]
    assert case.takes(case.only[0]) and not case.takes("published, fp16")
    assert cases.select("layer", "smoke", CPU)[0].takes("published, fp16")
