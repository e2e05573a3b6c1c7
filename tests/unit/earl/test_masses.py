"""Masses on disk are those in memory, and discovery finds the same in them, a few layers at a time."""

import numpy as np
import pytest

from megatron_ext.config.schema import DiscoverConfig
from megatron_ext.earl.clusters import discover
from megatron_ext.earl.masses import MassFile, mass_file
from megatron_ext.errors import UserError

QUICK = DiscoverConfig(committee_top=4, permutations=200, bootstraps=40)


def write(path, mass_NLE, dtype="float64"):
    with mass_file(path, mass_NLE.shape, np.dtype(dtype)) as writer:
        for row in np.random.default_rng(0).permutation(len(mass_NLE)):
            writer.write(int(row), 1, mass_NLE[row, 1:])
            writer.write(int(row), 0, mass_NLE[row, :1])
    return MassFile(path)


@pytest.mark.parametrize(("dtype", "off"), [("float64", 0.0), ("float32", 1e-7), ("float16", 5e-4)])
def test_what_is_written_row_by_row_is_read_layer_by_layer(planted_prompts, tmp_path, dtype, off):
    mass = planted_prompts(0, num_prompts=12)[0]
    file = write(tmp_path / "mass.npy", mass, dtype)
    assert file.shape == mass.shape
    np.testing.assert_allclose(file.layers(0, 3), mass, atol=off, rtol=0)
    np.testing.assert_array_equal(file.layers(1, 2), file.layers(0, 3)[:, 1:2])
    np.testing.assert_array_equal(np.load(tmp_path / "mass.npy").transpose(1, 0, 2), file.layers(0, 3).astype(dtype))


def test_a_file_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), mass_file(tmp_path / "mass.npy", (2, 1, 3), np.dtype("float32")):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_off_or_is_something_else_is_refused(planted_prompts, tmp_path):
    path = tmp_path / "mass.npy"
    write(path, planted_prompts(0, num_prompts=12)[0])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="for 3 layers of 12 prompts and 10 experts; run `discover` again"):
        MassFile(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        MassFile(path)


def test_rows_and_layers_that_are_not_there_are_our_mistake(tmp_path):
    with mass_file(tmp_path / "mass.npy", (2, 3, 4), np.dtype("float32")) as writer:
        for row, layer in ((2, 0), (-1, 0), (0, 3)):
            with pytest.raises(IndexError, match="the file has 2 rows and 3 layers"):
                writer.write(row, layer, np.zeros((1, 4)))


@pytest.mark.parametrize("method", ["topm", "louvain"])
def test_layer_by_layer_from_disk_finds_what_all_at_once_in_memory_does(planted_prompts, tmp_path, method):
    """Equal but for the last bits of sums over layers, and of the float32 arithmetic of permutations."""
    mass, skills, templates, planted = planted_prompts(0, boost=1.6)
    control = np.random.default_rng(1).dirichlet(np.full(10, 50.0), size=mass.shape[:2])
    config = QUICK.model_copy(update={"method": method})
    whole = discover(mass, skills, templates, config, seed=1, control_NLE=control)
    parts = discover(write(tmp_path / "mass.npy", mass), skills, templates, config, seed=1, control_NLE=write(tmp_path / "control.npy", control), block_bytes=1)
    for one, other in zip(whole.skills, parts.skills, strict=True):
        assert (one.status, one.reason, one.jaccard, one.uncontrolled_pairs) == (other.status, other.reason, other.jaccard, other.uncontrolled_pairs)
        assert set(whole.pairs(one.skill)) == planted[one.skill]
        assert (one.auroc, one.transfer_auroc, one.sigma) == pytest.approx((other.auroc, other.transfer_auroc, other.sigma), rel=1e-12)
        for pair, twin in zip(one.pairs, other.pairs, strict=True):
            assert vars(pair) == pytest.approx(vars(twin), rel=1e-9)
    assert whole.critical_z == pytest.approx(parts.critical_z, rel=1e-5)
    for name in ("mean_mass_XLE", "risk_difference_XLE", "information_L"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), atol=1e-12)
