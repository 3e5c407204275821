"""Figures of generators and detectors: what stands where, vectors and pictures, colors told apart, bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from vision3dgen.viz import PALETTE, latent_traversals, precision_recall_curve, speed_curves


def test_each_latent_is_a_row_and_each_value_a_column(tmp_path):
    moved = torch.zeros(2, 3, 1, 8, 8)
    moved[1, 2] = 1.0
    sheet = latent_traversals(moved, [-2.0, 0.0, 2.5], path=tmp_path / "sheet.png", times=2)
    assert (np.array(Image.open(tmp_path / "sheet.png")) == sheet).all()
    height, width = sheet.shape[:2]
    cells = sheet[-(2 * 18) :, -(3 * 18) :].reshape(2, 18, 3, 18, 3).transpose(0, 2, 1, 3, 4)[:, :, :14, :14]
    assert (cells[0] == 0).all()
    assert (cells[1, :2] == 0).all()
    assert (cells[1, 2] == 255).all()
    assert (height, width) > (2 * 18, 3 * 18)  # room for titles
    with pytest.raises(ValueError, match=r"2 names and 2 values"):
        latent_traversals(moved, [0.0, 1.0])
    with pytest.raises(ValueError, match="1 or 3"):
        latent_traversals(torch.zeros(1, 1, 2, 4, 4), [0.0])


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_come_as_pictures_and_vectors(tmp_path, suffix, start):
    speed_curves({"cached": {1: 0.1, 16: 0.02}, "naive": {1: 2.0}}, tmp_path / f"speed.{suffix}")
    assert (tmp_path / f"speed.{suffix}").read_bytes().startswith(start)
    precision_recall_curve({"a": ([0.0, 0.5, 1.0], [1.0, 1.0, 0.5])}, tmp_path / f"curve.{suffix}")
    assert (tmp_path / f"curve.{suffix}").read_bytes().startswith(start)


def test_average_precision_is_the_area_of_the_steps(tmp_path):
    from matplotlib import rc_context

    curves = {"one": ([0.25, 0.5, 0.5, 0.75], [1.0, 1.0, 2 / 3, 0.75]), "none": (torch.zeros(2), torch.zeros(2))}
    with rc_context({"svg.fonttype": "none"}):  # text as text
        precision_recall_curve(curves, tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    assert f"one  {0.25 + 0.25 + 0.25 * 0.75:.3f}" in text
    assert "none  0.000" in text
    for found in (([0.5, 0.2], [1, 1]), ([0.5], [1.0, 1.0]), ([], [])):
        with pytest.raises(ValueError, match="recall"):
            precision_recall_curve({"bad": found}, tmp_path / "x.png")


def test_speeds_that_no_logarithm_has_are_refused(tmp_path):
    for bad in ({}, {"a": {}}, {"a": {1: 0.0}}, {"a": {0: 1.0}}):
        with pytest.raises(ValueError, match=r"measured|above 0"):
            speed_curves(bad, tmp_path / "x.png")


# Machado, Oliveira and Fernandes 2009, severity 1, in linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    f = np.cbrt(np.clip(xyz / [0.9505, 1.0, 1.089], 1e-4, None))
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("name", DEFICIENCIES)
def test_colors_stay_apart_for_color_blind_readers(name):
    linear = np.array(PALETTE) ** 2.2
    seen = lab(np.clip(linear @ np.array(DEFICIENCIES[name]).T, 0, 1))
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 1e9 * np.eye(len(PALETTE))
    assert apart.min() > 7, f"colors {np.unravel_index(apart.argmin(), apart.shape)}"  # 2.3 is just noticeable
