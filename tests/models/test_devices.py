"""The table of devices and the words that name them."""

import pytest

from pipeline.core.errors import UserError
from pipeline.models import devices
from pipeline.train import peak_flops


def test_rates_are_those_of_the_table_of_peaks():
    for device in devices.DEVICES:
        known = peak_flops.known(device.driver_name, "bf16")
        assert known is None or known == device.peak, device.name
        assert device.source and 0 < device.usable < device.memory
    assert sum(peak_flops.known(device.driver_name, "bf16") is not None for device in devices.DEVICES) >= 7


@pytest.mark.parametrize(
    "text, name, nodes, local",
    [
        ("64xH100-80G", "H100-80G", 8, 8),
        ("4 x h100", "H100-80G", 1, 4),
        ("16xA100-40GB", "A100-40G", 2, 8),
        ("8xMI300X", "MI300X-192G", 1, 8),
        ("2xRTX4090", "RTX4090-24G", 1, 2),
        ("1xASCEND910B", "ASCEND910B-64G", 1, 1),
        ("4xcpu", "CPU", 1, 4),
    ],
)
def test_words_that_name_devices(text, name, nodes, local):
    cluster = devices.parse(text)
    assert (cluster.device.name, cluster.nodes, cluster.local) == (name, nodes, local)


def test_nodes_and_links_of_ones_own():
    cluster = devices.parse("12xH100", per_node=4, network=12.5)
    assert (cluster.nodes, cluster.local, cluster.device.network) == (3, 4, 12.5e9)


@pytest.mark.parametrize(
    "text, part",
    [
        ("H100", "NUMBERxDEVICE"),
        ("8xH1000", "did you mean"),
        ("8xA100", "A100-40G"),
        ("0xH100", "expected 1 to"),
        ("12xH100", "use 8 or 16"),
    ],
)
def test_words_that_do_not(text, part):
    with pytest.raises(UserError, match=part):
        devices.parse(text)
