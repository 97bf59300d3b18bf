"""Muon under FSDP: matrices that no process holds are orthogonalised as one process does it."""

import harness
import muon_worker
import pytest
import torch
from parallel_worker import go_on
from paths import HELPERS

from pipeline.train import muon, muon_sharded


def shapes(*sizes) -> list[torch.Size]:
    return [torch.Size(size) for size in sizes]


@pytest.mark.parametrize("rows, world", [(8, 2), (7, 3), (2, 4), (9, 4), (1, 1)])
def test_rows_are_distributed_as_torch_does(rows, world):
    parts = torch.arange(rows).chunk(world)
    expected = [len(part) for part in parts] + [0] * (world - len(parts))
    assert muon_sharded.rows_of_each(rows, world) == expected


def test_each_matrix_has_one_process_and_all_have_as_much_to_do():
    sizes = shapes(*[(64, 64)] * 9, *[(64, 256)] * 6, *[(16, 64)] * 6)
    found = list(muon_sharded.rounds(sizes, 4))
    indices = [index for owned in found for own in owned for index in own]
    assert sorted(indices) == list(range(len(sizes)))
    work = [0] * 4
    for owned in found:
        for rank, own in enumerate(owned):
            work[rank] += sum(min(sizes[index]) ** 2 * max(sizes[index]) for index in own)
    assert max(work) < 1.2 * min(work)


@pytest.mark.parametrize("bucket", [1, 64 * 64, 3 * 64 * 64, 10**9])
def test_a_round_has_a_bucket_of_elements(monkeypatch, bucket):
    monkeypatch.setattr(muon_sharded, "MUON_BUCKET", bucket)
    sizes = shapes(*[(64, 64)] * 13)
    for owned in muon_sharded.rounds(sizes, 3):
        for own in owned:
            assert len(own) <= 1 or sum(sizes[index].numel() for index in own) <= bucket
    assert len(list(muon_sharded.rounds(sizes, 3))) == {1: 5, 64 * 64: 5, 3 * 64 * 64: 2, 10**9: 1}[bucket]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_batch_of_matrices_is_each_of_them(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    options = (torch.float32, (3.4445, -4.775, 2.0315), 5, 1e-7)
    found = muon.orthogonalised_batch(matrices, *options)
    for one, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(one, muon.orthogonalised(matrix, *options), rtol=1e-5, atol=1e-6)


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def alone(folder):
    """One process. Three steps of the plain one are what other layouts resume from."""
    found = {kind: muon_worker.train({}, folder / f"one {kind}", kind=kind) for kind in ("plain", "tied")}
    found["bf16"] = muon_worker.train({}, folder / "one bf16", "bf16")["steps"]
    (folder / "one plain").rename(folder / "one")
    return found


def launched(folder, world: int) -> dict:
    harness.launch(world, HELPERS / "muon_worker.py", folder / f"{world}.pt", cwd=folder, seconds=900)
    return torch.load(folder / f"{world}.pt", weights_only=False)


def the_same(found: list[dict], expected: list[dict], rel: float) -> None:
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert other["applied"] and [other["loss"], other["grad_norm"]] == pytest.approx(
            [one["loss"], one["grad_norm"]], rel=rel
        )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_train_as_one_does(folder, alone, world):
    """To 1e-5 in fp32, all matrices in a round or one at a time (tied); resumed to the bit from their own checkpoint,
    and to 1e-5 from one process's and back; a NaN is kept out."""
    results = launched(folder, world)
    layouts = {key[0] for key in results if isinstance(key, tuple)}
    assert layouts == (set(muon_worker.LAYOUTS) if world == 4 else {"full"})
    for name in layouts:
        for kind in ("plain", "tied"):
            found, expected = results[name, kind], alone[kind]
            the_same(found["steps"], expected["steps"], 1e-5)
            assert found["said"] == "" and found["again"] == found["steps"][3:]
            assert found["state bytes"] == expected["state bytes"]
            for key, value in found["weights"].items():
                assert torch.equal(value, found["weights again"][key]) and torch.equal(value, found["after nan"][key])
                torch.testing.assert_close(value, expected["weights"][key], rtol=0, atol=1e-4)
            assert not found["nan applied"]
            said, again = go_on(muon_worker.built({}, kind=kind), folder / f"{world} {name} {kind}")
            the_same(again, expected["steps"][3:], 1e-5)
            assert said.startswith(f"saved with {world} processes")
        the_same(results["from one"][name][1], alone["plain"]["steps"][3:], 1e-5)
    the_same(results["bf16"], alone["bf16"], 1e-3)
