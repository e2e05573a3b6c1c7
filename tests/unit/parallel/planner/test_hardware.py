"""Devices, links, and files that describe them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.parallel.planner.hardware import Cluster, find_gpu, read_gpus

GPUS = read_gpus()


def test_a_type_is_found_by_the_beginning_of_its_name() -> None:
    assert find_gpu("h200", GPUS).name == "h200-141gb"
    with pytest.raises(UserError, match="did you mean h100-80gb"):
        find_gpu("h100-8gb", GPUS)


def test_a_ring_passes_all_but_its_own_part_and_shares_the_network_links_of_a_node() -> None:
    """1 GB over 8 ranks of a node: 7/8 GB at 0.7 x 450 GB/s. Over 16 ranks on two nodes, 8 links of 50 GB/s serve the ring; one rank a node has one link."""
    cluster = Cluster(find_gpu("h100", GPUS), 64, 8)
    gpu = cluster.gpu
    assert cluster.collective_s(1e9, 8, 1) == pytest.approx(7 / 8 * 1e9 / (0.7 * 450e9) + gpu.node_latency_s)
    assert cluster.collective_s(1e9, 16, 1) == pytest.approx(15 / 16 * 1e9 / (0.7 * 400e9) + gpu.network_latency_s)
    assert cluster.collective_s(1e9, 8, 8) == pytest.approx(7 / 8 * 1e9 / (0.7 * 50e9) + gpu.network_latency_s)
    assert cluster.collective_s(1e9, 1, 1) == 0


def test_experts_on_other_nodes_are_reached_over_one_link_a_rank() -> None:
    cluster = Cluster(find_gpu("h100", GPUS), 64, 8)
    assert cluster.all_to_all_s(1e9, 16, 1) == pytest.approx(8 / 16 * 1e9 / (0.7 * 50e9) + cluster.gpu.network_latency_s)
    assert cluster.all_to_all_s(1e9, 8, 1) == pytest.approx(7 / 8 * 1e9 / (0.7 * 450e9) + cluster.gpu.node_latency_s)


def test_nodes_are_full() -> None:
    with pytest.raises(UserError, match="--gpus: 12 do not fill nodes of --gpus-per-node 8; use 8 or 16"):
        Cluster(GPUS["h100-80gb"], 12, 8)


def test_a_file_adds_types_and_replaces_numbers(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    rates = "memory_bytes_per_s: 1.0e+11, node_bytes_per_s: 1.0e+10, network_bytes_per_s: 1.0e+9"
    mine.write_text(f"defaults: {{mfu: 0.4}}\ngpus:\n  x1: {{memory_gib: 10, bf16_flops: 1.0e+12, fp32_flops: 1.0e+12, {rates}}}\n  h200-141gb: {{mfu: 0.5}}\n")
    gpus = read_gpus(mine)
    assert gpus["x1"].memory_bytes == 10 * 2**30
    assert gpus["x1"].mfu == gpus["h100-80gb"].mfu == 0.4
    assert (gpus["h200-141gb"].mfu, gpus["h200-141gb"].memory_gib) == (0.5, 139.8), "a type that is there keeps the rest"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus: {h100-80gb: {mfuu: 1}}", "did you mean mfu"),
        ("gpus: {x: {memory_gib: 10}}", "field required"),
        ("gpus: {x: {memory_gib: -1}}", "greater than 0"),
        ("gpu: {}", "'gpu' is not one of its sections; there are: defaults, gpus"),
        ("- 1", "has no sections"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_file_that_is_wrong_is_told_where(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_gpus(tmp_path / "f.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_gpus(tmp_path / "missing.yaml")
