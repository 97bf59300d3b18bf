"""The model of step times: against published runs, and against arithmetic by hand."""

import dataclasses
import importlib.util

import pytest
import torch
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.models import cost, devices, step_time
from pipeline.models.step_time import Setup


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_plan", ROOT / "benchmarks" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_published_runs_are_predicted_within_15_percent(benchmark, capsys):
    """The median error of at least ten rows that did not calibrate anything, over all and for each source."""
    figures = benchmark.report()
    assert figures["rows"] - figures["fit_rows"] >= 10
    assert figures["median_error_test"] < 0.15
    for source in {row.source for row in benchmark.ROWS}:
        errors = sorted(abs(row.error) for row in benchmark.ROWS if row.source == source and not row.fit)
        assert errors[len(errors) // 2] < 0.20, source
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in benchmark.ROWS)


@pytest.fixture(scope="module")
def llama():
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
            )
        )


def test_the_shape_of_a_model(llama):
    shape = step_time.shape_of(llama, 2048)
    size = cost.count(llama)
    assert shape.parameters == size.total and len(shape.matrices) == 7
    flops = cost.training_flops(llama, size, 2048).full
    assert shape.flops(2048) == pytest.approx(flops, rel=1e-4), "norms are parameters that hardly multiply"


def test_a_ring_by_hand():
    """8 devices of a node: 7/8 of the bytes at 80% of 450 GB/s. 16 of two nodes: the 8 cards of a node, 400 GB/s, are
    slower than the links in it. One of each node: one card."""
    cluster = devices.parse("16xH100")
    gigabyte = 1e9
    assert step_time.ring_seconds(gigabyte, 1, 1, cluster) == 0
    assert step_time.ring_seconds(gigabyte, 8, 1, cluster) == pytest.approx(7 / 8 / (0.8 * 450), rel=0.01)
    assert step_time.ring_seconds(gigabyte, 16, 1, cluster) == pytest.approx(15 / 16 / (0.8 * 400), rel=0.02)
    assert step_time.ring_seconds(gigabyte, 2, 8, cluster) == pytest.approx(1 / 2 / (0.8 * 50), rel=0.01)


def test_a_bubble_by_hand(llama):
    """(p - 1) / (m + p - 1) of the time of p stages and m micro-batches; a third of it with three chunks."""
    shape, cluster = step_time.shape_of(llama, 2048), devices.parse("4xH100")
    setup = Setup(2048, 1, 13, stages=4)
    parts = step_time.step_seconds(shape, dataclasses.replace(setup, data=1), cluster)
    update = step_time.UPDATE_BYTES * shape.parameters / 4 / cluster.device.bandwidth
    assert parts["bubble"] / (sum(parts.values()) - update) == pytest.approx(3 / 16)
    chunked = step_time.step_seconds(shape, dataclasses.replace(setup, chunks=3), cluster)
    assert chunked["bubble"] == pytest.approx(parts["bubble"] / 3, rel=0.05)


def test_one_device_communicates_nothing_and_checkpointing_costs_a_forward_pass(llama):
    shape, cluster = step_time.shape_of(llama, 2048), devices.parse("1xH200")
    none = step_time.step_seconds(shape, step_time.setup_of(cost.Layout(micro=2), 2048), cluster)
    full = step_time.step_seconds(shape, step_time.setup_of(cost.Layout(micro=2, checkpointing="full"), 2048), cluster)
    assert none["communication"] == none["bubble"] == 0
    assert full["products"] / none["products"] == pytest.approx(4 / 3, rel=0.02)


def test_more_devices_are_never_slower_in_all(llama):
    shape = step_time.shape_of(llama, 2048)
    speeds = []
    for count in (8, 64, 512):
        layout = cost.Layout(ranks=count, zero=3, micro=4, accumulation=1024 // count)
        speeds.append(
            step_time.tokens_per_second(shape, step_time.setup_of(layout, 2048), devices.parse(f"{count}xH100"))
        )
    assert speeds == sorted(speeds) and speeds[-1] < 64 * speeds[0]
