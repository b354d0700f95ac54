"""Pictures of volumes and haplotypes: the right slice the right way up, the right neighbour, and who may see it."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from engine.audit import Pool
from engine.imaging.volume import Volume, write_volume
from engine.release import images
from engine.release.report import write_report


def test_slices_stand_upright_and_in_order():
    """A mark at the left front bottom of the body is at the lower slice, above, on the left of the picture."""
    array = np.full((1, 20, 30, 40), -1, np.float32)
    array[0, :2, -2:, :4] = 1  # RAS: x grows to the right, y to the front, z to the top of the head
    (stack,) = images.slices_of([SimpleNamespace(array_cdhw=array)], "axial")
    assert stack.shape == (12, 30, 20)
    assert stack.dtype == np.uint8
    assert (stack[0, :2, :2] == 255).all()
    assert stack[0].astype(int).sum() == 4 * 255
    assert (stack[1:] == 0).all()
    (side,) = images.slices_of([SimpleNamespace(array_cdhw=array)], "sagittal")
    assert side.shape == (12, 40, 30)
    assert (side[0, -4:, -2:] == 255).all()  # the bottom is below, the front on the right
    (front,) = images.slices_of([SimpleNamespace(array_cdhw=array)], "coronal")
    assert front.shape == (12, 40, 20)


def test_large_volumes_are_thinned():
    stack = images.slices_of([SimpleNamespace(array_cdhw=np.zeros((1, 300, 200, 7), np.float32))])
    assert stack.shape == (1, 7, 67, 100)


def pools(length: int = 130) -> tuple[Pool, Pool, np.ndarray]:
    rng = np.random.default_rng(0)
    bits_nl = rng.integers(0, 2, (8, length)).astype(np.uint8)
    bits_nl[0, 20:90] = bits_nl[5, 20:90]  # a long shared stretch
    padded = np.zeros((8, 192), np.uint8)
    padded[:, :length] = bits_nl
    data = np.packbits(padded, axis=1, bitorder="little").view(np.uint64)
    position = np.cumsum(rng.integers(1, 1000, length))
    whole = Pool("bits", data, np.array(list("aabbccdd")), None, None, length, position)
    return whole.select(np.arange(4)), whole.select(np.arange(4, 8)), bits_nl


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("beside", range(4))
def test_shared_stretches_are_those_found_letter_by_letter(row, beside):
    made, real, bits_nl = pools()
    position = made.position_bp
    wanted, start = [], None
    for at in range(131):
        same = at < 130 and bits_nl[row, at] == bits_nl[4 + beside, at]
        if same and start is None:
            start = at
        if not same and start is not None:
            wanted.append((position[start], position[at - 1]))
            start = None
    shortest = (position[-1] - position[0]) / 50
    assert images.shared_stretches(made, row, real, beside, most=50) == [w for w in wanted if w[1] - w[0] >= shortest]


def test_suspects_of_a_panel_are_one_a_person():
    made, real, _ = pools()
    result = SimpleNamespace(suspects=[(0, 1, 0.001), (1, 2, 0.01), (2, 0, 0.2)])
    (section,) = images.internal_sections("genotypes", result, {"train": real, "synthetic": made}, None, None)
    assert section.internal
    figure = section.figures["suspects"]
    assert figure["labels"] == ["p 0.001", "p 0.2"]
    longest = max(b - a for a, b in figure["segments"][0])
    position = made.position_bp
    assert longest >= position[89] - position[20]


def test_suspects_of_scans_stand_above_their_neighbour(tmp_path):
    """Constant grey levels tell which scan is shown."""
    for side, n in (("train", 5), ("synthetic", 4)):
        (tmp_path / side).mkdir()
        with (tmp_path / side / "volumes.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["image", "subject"])
            for k in reversed(range(n)):  # the table's order counts, not the names'
                array = np.zeros((1, 8, 9, 10), np.float32)
                array[0, k, 4, 5] = 1
                write_volume(Volume(array, np.eye(4), "MR", "arbitrary", {}), tmp_path / side / f"{k}.nii")
                writer.writerow([f"{k}.nii", f"P{k}"])
    features = {side: Pool("features", np.zeros((n, 2), np.float32), np.arange(n).astype(str))
                for side, n in (("train", 5), ("synthetic", 4))}  # fmt: skip
    result = SimpleNamespace(suspects=[(3, 1, 0.01), (0, 4, 0.5)])
    suspects, random = images.internal_sections("scans", result, features, tmp_path / "train", tmp_path / "synthetic")
    assert suspects.internal
    assert random.internal
    rows = suspects.figures["suspects"]["rows"]
    columns = [[int(tile.max(axis=(0, 1)).argmax()) for tile in tiles] for tiles in rows.values()]
    assert columns == [[0, 3], [3, 0]]  # rows 3 and 0 of the table are scans 0 and 3; neighbours 1 and 4 are 3 and 0
    assert set(random.figures["slices"]["rows"]) == {"synthetic", "real"}
    page = write_report(
        tmp_path / "r.html", title="T", verdict="pass", summary=[], sections=[suspects, random]
    ).read_text()
    assert page.count('alt="nearest training scan, axial slice') == 10
    few = {**features, "train": features["train"].select(np.arange(4))}
    assert images.internal_sections("scans", result, few, tmp_path / "train", tmp_path / "synthetic") == []
