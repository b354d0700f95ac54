"""Drawings: what they show, that they are the same each time, and that text stays text."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from engine.release import figures

RNG = np.random.default_rng(0)
CASES = {
    "pca": (figures.pca, {"real": RNG.normal(size=(30, 2)), "synthetic": RNG.normal(size=(20, 2))}),
    "pca_groups": (
        figures.pca,
        {"real": RNG.normal(size=(4, 2)), "synthetic": RNG.normal(size=(3, 2)), "group": ["AFR", "EUR", "AFR", "EUR"]},
    ),
    "ld_decay": (
        figures.ld_decay,
        {"distance_bp": [100, 1000, 1e5], "real": [0.6, 0.3, 0.1], "synthetic": [0.5, 0.3, 0]},
    ),
    "af": (figures.af, {"real": RNG.random(5000), "synthetic": RNG.random(5000)}),
    "sfs": (figures.sfs, {"real": [5, 3, 1], "synthetic": [4, 4, 1]}),
    "sfs_frequency": (figures.sfs, {"frequency": [0.1, 0.2, 0.4], "real": [5, 3, 1], "synthetic": [4, 4, 1]}),
    "histogram": (figures.histogram, {"edges": [0, 1, 2], "real": [1, 3], "synthetic": [2, 2], "threshold": 0.5}),
    "rho": (figures.rho, {"edges": [-1, 0, 1], "shares": {"real, unseen": [0.5, 0.5], "synthetic": [1, 0]}}),
    "roc": (figures.roc, {"copycat": {"fpr": [0, 0, 1], "tpr": [0, 1, 1], "auc": 1.0}}),
    "scatter": (
        figures.scatter,
        {"x": [1, 2, 3], "y": [2, 4, 6], "x_label": "age (years)", "lines": {"truth": {"slope": 2, "intercept": 0}}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_drawing_is_well_formed_deterministic_and_has_text(name):
    draw, figure = CASES[name]
    svg = draw(figure)
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert {"viewBox"} <= set(root.attrib)
    assert not {"width", "height"} & set(root.attrib)  # scales to its column
    assert svg == draw(figure)
    words = [e.text for e in root.iter() if e.tag.endswith("text") and e.text]
    assert len(words) > 4, "axis labels are text, not outlines"
    assert "<script" not in svg
    assert 'xlink:href="http' not in svg


def test_labels_carry_units_and_n():
    assert "distance between sites (kb)" in figures.ld_decay(CASES["ld_decay"][1])
    assert "real (n = 30)" in figures.pca(CASES["pca"][1])
    grouped = figures.pca(CASES["pca_groups"][1])
    assert "AFR, real" in grouped
    assert figures.ALERT.lower() in grouped.lower(), "synthetic points without a group have a colour that no group has"
    both = figures.pca({**CASES["pca_groups"][1], "synthetic_group": ["EUR", "AFR", "EUR"]})
    assert "EUR, synthetic" in both
    assert "truth, fit" in figures.scatter(CASES["scatter"][1])


def test_histogram_draws_shares_of_counts():
    """Counts of 1 and 3 and shares of .25 and .75 are the same drawing."""
    shares = {"edges": [0, 1, 2], "real": [0.25, 0.75], "synthetic": [0.5, 0.5], "threshold": 0.5}
    assert figures.histogram(shares) == figures.histogram(CASES["histogram"][1])
    assert figures.histogram({**shares, "real": [0.5, 0.5]}) != figures.histogram(shares)


def test_drawing_stays_small_with_many_points():
    figure = {"real": RNG.random(200_000), "synthetic": RNG.random(200_000)}
    assert len(figures.af(figure)) < 1_000_000


def test_montage_keeps_every_pixel():
    tiles = RNG.integers(0, 256, (2, 3, 5, 4)).astype(np.uint8)
    image = np.asarray(Image.open(io.BytesIO(figures.montage_png(tiles, gap=1))))
    scale = image.shape[1] // (3 * 4 + 2)
    small = image[::scale, ::scale]
    assert small.shape == (2 * 5 + 1, 3 * 4 + 2)
    for r in range(2):
        for c in range(3):
            assert (small[r * 6 : r * 6 + 5, c * 5 : c * 5 + 4] == tiles[r, c]).all()
    uri = figures.montage(tiles)
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == figures.montage_png(tiles)
    with pytest.raises(ValueError, match="uint8"):
        figures.montage_png(tiles.astype(float))
