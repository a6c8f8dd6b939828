import numpy as np
import pytest

from zoo.data import point_clouds

CUBE = """OFF8 6 0
0 0 0
1 0 0
1 1 0
0 1 0
0 0 1
1 0 1
1 1 1
0 1 1
4 0 3 2 1
4 4 5 6 7
4 0 1 5 4
4 1 2 6 5
4 2 3 7 6
4 3 0 4 7
"""


def test_digits_are_ink_in_relief():
    found = point_clouds.digits3d(256, samples=30)
    assert found.points.shape == (30, 256, 3) and found.points.dtype == np.float32
    assert found.labels[:10].tolist() == list(range(10))  # as scikit-learn has them
    np.testing.assert_allclose(found.points.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.points, axis=-1).max(1), 1, rtol=1e-5)
    assert (np.abs(found.points[..., 2]).max(1) < 0.1).all()  # flat
    zero, one = found.points[0], found.points[1]
    assert zero[:, 0].std() > 1.2 * one[:, 0].std()  # a ring is wider than a stroke


def test_solids_have_uniform_surfaces():
    found = point_clouds.cad_shapes(16, 400)
    assert found.points.shape == (16, 400, 3) and found.names == point_clouds.SOLIDS
    assert found.labels.tolist() == [*range(8), *range(8)]
    rng = np.random.default_rng(0)
    _, draw = point_clouds._ellipsoid((1.0, 1.0, 0.2))
    height = np.abs(draw(rng, 20_000)[:, 2]) / 0.2
    # A spheroid's area between t and t + dt of its height is proportional to sqrt(c^2 (1 - t^2) + t^2) dt.
    t = np.linspace(0, 1, 2001)
    density = np.sqrt(0.2**2 * (1 - t**2) + t**2)
    assert np.mean(height > 0.5) == pytest.approx(density[t > 0.5].sum() / density.sum(), abs=0.02)
    _, draw = point_clouds._round(1.0, 0.0, 1.0)
    points = draw(rng, 20_000)
    side = points[:, 2] > 1e-9
    assert np.mean(side) == pytest.approx(2**0.5 / (1 + 2**0.5), abs=0.02)
    assert points[side, 2].mean() == pytest.approx(1 / 3, abs=0.01)  # a cone's slope is widest below


def test_meshes_are_read_and_sampled(tmp_path):
    (tmp_path / "cubes").mkdir()
    (tmp_path / "cubes" / "a.off").write_text(CUBE)
    vertices, triangles = point_clouds.read_off(tmp_path / "cubes" / "a.off")
    assert vertices.shape == (8, 3) and triangles.shape == (12, 3)
    points = point_clouds.sample_surface(vertices, triangles, 6000, np.random.default_rng(0))
    faces = [np.isclose(points[:, axis], side).mean() for axis in range(3) for side in (0, 1)]
    np.testing.assert_allclose(faces, 1 / 6, atol=0.02)
    np.testing.assert_allclose(points.mean(0), 0.5, atol=0.02)
    found = point_clouds.read_meshes(tmp_path, 50)
    assert found.points.shape == (1, 50, 3) and found.names == ("cubes",)


@pytest.mark.parametrize(
    "text, message",
    [("PLY\n", "is not an OFF file"), (CUBE[:60], "is damaged"), (CUBE.replace("4 0 3 2 1", "4 0 3 2 9"), "no vertex")],
)
def test_damaged_meshes_say_so(tmp_path, text, message):
    (tmp_path / "a.off").write_text(text)
    with pytest.raises(ValueError, match=message):
        point_clouds.read_off(tmp_path / "a.off")


def test_published_files_are_read(tmp_path):
    h5py = pytest.importorskip("h5py")
    points = np.random.default_rng(0).normal(size=(4, 9, 3)).astype(np.float32)
    np.savez(tmp_path / "shapenet.npz", data=points)
    with h5py.File(tmp_path / "modelnet.h5", "w") as file:
        file["data"], file["label"] = points, np.array([[2], [0], [1], [2]])
    for name in ("shapenet.npz", "modelnet.h5"):
        found = point_clouds.read_clouds(tmp_path / name)
        np.testing.assert_allclose(found.points, point_clouds.normalized(points))
    assert found.labels.tolist() == [2, 0, 1, 2]
    np.savez(tmp_path / "other.npz", data=points[0])
    with pytest.raises(ValueError, match="must hold 'data' of shape"):
        point_clouds.read_clouds(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match=r"no \.off file below"):
        point_clouds.read_meshes(tmp_path)


def test_sets_are_joined_split_and_drawn_from():
    one, two = point_clouds.cad_shapes(4, 20, kinds=("box", "cone")), point_clouds.cad_shapes(6, 20, kinds=("torus",))
    both = point_clouds.joined(one, two)
    assert both.names == ("box", "cone", "torus") and both.labels.tolist() == [0, 1, 0, 1] + [2] * 6
    kept, test = both.split(0.3)
    assert len(kept.points) == 7 and len(test.points) == 3
    drawn = point_clouds.resampled(both.points, 50, np.random.default_rng(0))
    assert drawn.shape == (10, 50, 3) and len(np.unique(drawn[0], axis=0)) <= 20
    with pytest.raises(ValueError, match="sphere"):
        point_clouds.cad_shapes(4, 20, kinds=("sphere",))
