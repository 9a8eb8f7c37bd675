"""The generator of the page on ZeroGPU and elsewhere."""

import inspect
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from otdrg import ReportGenerationPipeline
from otdrg.hub_card.space.interface import build_demo
from otdrg.hub_card.space.zero_gpu import on_gpu


def generator():
    yield 1


def test_on_gpu_without_spaces_is_the_generator_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", None)  # as if it were not installed
    assert on_gpu(generator) is generator


def test_on_gpu_outside_zero_gpu_is_the_generator_itself(monkeypatch):
    spaces = pytest.importorskip("spaces", reason="spaces is not installed")
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert on_gpu(generator) is generator and callable(spaces.GPU)


def test_page_decorates_a_generator_whose_arguments_are_small(model, processor, monkeypatch):
    """ZeroGPU pickles arguments, so that neither the model nor a bank may be one of them."""
    decorated = []
    monkeypatch.setitem(sys.modules, "spaces", SimpleNamespace(GPU=lambda task: decorated.append(task) or task))
    build_demo(ReportGenerationPipeline(model=model, processor=processor), "org/otdrg")
    (stream,) = decorated
    assert inspect.isgeneratorfunction(stream)
    assert list(inspect.signature(stream).parameters) == ["views", "indication", "states", "candidates"]
