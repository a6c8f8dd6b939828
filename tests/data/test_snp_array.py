import numpy as np
import pytest

from zoo.data import snp_array


@pytest.fixture(scope="module")
def loci():
    return snp_array.simulate_loci(4000, 1.0)


def test_slopes_are_those_of_lines_through_three_values():
    track = np.random.default_rng(0).normal(size=9)
    slope = snp_array.savitzky_golay_slope(track)
    for t in range(9):
        middle = min(max(t, 1), 7)
        assert slope[t] == pytest.approx(np.polyfit([-1, 0, 1], track[middle - 1 : middle + 2], 1)[0])
    with pytest.raises(ValueError, match="at least three values"):
        snp_array.savitzky_golay_slope(track[:2])


def test_breakpoints_are_the_last_probes_before_changes():
    track = np.repeat([2, 1, 2, 3], [10, 20, 1, 30])
    np.testing.assert_array_equal(snp_array.breakpoints_from_copy_number(track), [9, 29, 30])
    blip = np.array([2.0] * 5 + [3] + [2] * 5)
    assert not len(snp_array.breakpoints_from_copy_number(blip))  # as published


def test_simulated_states_look_like_arrays(loci):
    normal, deleted, neutral = (loci.states[state] for state in ("(1,1)", "(0,1)", "(0,2)"))
    assert deleted.lrr.mean() < normal.lrr.mean() - 0.4 and abs(neutral.lrr.mean() - normal.lrr.mean()) < 0.1
    heterozygous = [np.mean(np.abs(state.baf - 0.5) < 0.15) for state in (normal, neutral)]
    assert heterozygous[0] > 0.2 and heterozygous[1] < 0.02
    assert (normal.baf == snp_array.NO_SNP).mean() == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match=r"cellularity must be in \[0, 1\], got 2"):
        snp_array.simulate_loci(10, 2)


def test_halves_share_no_locus(loci):
    first, second = loci.half(False), loci.half(True)
    for state, whole in loci.states.items():
        np.testing.assert_array_equal(np.concatenate([first.states[state].lrr, second.states[state].lrr]), whole.lrr)


def test_sequences_have_known_breakpoints(loci):
    sequence = snp_array.acnr_sequence(loci, 5000, (300, 900), 1)
    places = np.flatnonzero(np.diff(sequence.state))
    assert len(sequence.lrr) == 5000 and (np.diff(places) >= 300).all() and (np.diff(places) <= 900).all()
    np.testing.assert_array_equal(snp_array.breakpoints_from_copy_number(sequence.state), places)
    with pytest.raises(ValueError, match="two or more of the states"):
        snp_array.acnr_sequence(loci, 10, states=["(1,1)"])


def test_windows_hold_their_breakpoints_and_negatives_none(loci):
    margin, width = 50, 200
    sequence = snp_array.acnr_sequence(loci, 20_000, (200, 3000), 2)
    windows = snp_array.make_windows(sequence, margin, 3)
    positive = windows.label == 1
    assert windows.x.shape[1:] == (2, width, 1) and 0 < positive.sum() < len(positive)
    places = windows.position[positive]
    assert ((places >= 0) & (places < width)).all() and (windows.position[~positive] == -1).all()
    assert places.std() > 20  # jittered
    middle = snp_array.make_windows(sequence, margin, 3, jitter=False)
    assert np.median(np.abs(middle.position[middle.label == 1] - width // 2)) <= 1


def test_windows_beyond_the_ends_are_padded(loci):
    sequence = snp_array.acnr_sequence(loci, 300, (100, 100), 0)
    x, label, position = snp_array.window_at(sequence, -50, 200)
    assert (x[:, :50] == snp_array.PADDING).all() and (label, position) == (1, 149)
    np.testing.assert_array_equal(x[1, 50:, 0], sequence.lrr[:150])


def test_batches_are_balanced(loci):
    windows = snp_array.balanced_windows(loci, 25, 31, 0)
    assert len(windows.label) == 31 and windows.label.sum() == 16


def test_binary_segmentation_cuts_where_the_mean_changes():
    rng = np.random.default_rng(0)
    tracks = rng.normal(0, 0.2, (2, 100))
    tracks[0, 37:] += 1
    found = snp_array.binary_segmentation(tracks)
    assert found.position[0] == 36 and found.gain[0] > 20 and found.gain[1] < 10
    with pytest.raises(ValueError, match="at least 10 probes"):
        snp_array.binary_segmentation(tracks[:, :9])


def test_published_arrays_are_read(tmp_path):
    np.savez(
        tmp_path / "GSE11976_CRL2324.npz", total_cn_milli=[2000, 1000, 4000, 2000], baf_milli=[500, -9999, 1000, 0],
        region=[0, 1, 1, 0], regions=["(1,1)", "(0,1)"], cellularity_pct=[50, 50, 50, 100],
    )  # fmt: skip
    half, whole = snp_array.read_acnr(tmp_path, least=1)
    assert (half.cellularity, whole.cellularity) == (0.5, 1.0) and set(whole.states) == {"(1,1)"}
    np.testing.assert_allclose(half.states["(0,1)"].lrr, [-1, 1])
    np.testing.assert_allclose(half.states["(0,1)"].baf, [-1, 1])
    with pytest.raises(FileNotFoundError, match="give the folder of GSE13372"):
        snp_array.read_acnr(tmp_path, "GSE13372_HCC1143")
    with pytest.raises(ValueError, match="array must be one of"):
        snp_array.read_acnr(tmp_path, "GSE1")


def test_dat_files_are_read(tmp_path):
    path = tmp_path / "patient.dat"
    header = "#Chr Pos LRR BAF tCN cCN GC MAP\n"
    path.write_text(header + "1\t100\t0.1\t0.5\t2\t2\t0.4\t1\nX\t200\t-0.4\t-1\t1\t2\t0.5\t1\n")
    profile = snp_array.read_dat(path)
    assert list(profile.chromosome) == ["1", "X"]
    np.testing.assert_allclose(profile.tracks["tCN"], [2, 1])
    path.write_text(header + "1\t100\t0.1\n")
    with pytest.raises(ValueError, match="line 2: expected 8 cells"):
        snp_array.read_dat(path)
    path.write_text("Chr\n")
    with pytest.raises(ValueError, match="expected the header"):
        snp_array.read_dat(path)
