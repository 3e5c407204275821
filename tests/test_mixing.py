"""Cutout, mixup and cutmix: what is hidden, what is mixed, and labels that say how much."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vision3dgen.datasets import MIXINGS, CutMix, Cutout, Mixed, Mixup, OneOf, collate
from vision3dgen.engine import Data, ShuffleSampler
from vision3dgen.engine.loading import make_loader

B, H, W, K = 5, 11, 17, 7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch() -> dict:
    """Images of one value each, that of their label."""
    label = torch.tensor([0, 3, 6, 3, 1])
    return {"image": label.float().view(B, 1, 1, 1).expand(B, 3, H, W).clone() + 1, "label": label, "id": list("abcde")}


def test_cutout_hides_one_clipped_square_of_each_image():
    sizes, touched = Counter(), 0
    for seed in range(60):
        given = batch()
        found = Cutout(4, fill=-1.0)(given, seeded(seed))
        assert torch.equal(found["label"], given["label"])
        hidden = found["image"][:, 0] == -1
        assert torch.equal(found["image"][:, 2] == -1, hidden)
        assert torch.equal(found["image"][:, 0][~hidden], given["image"][:, 0][~hidden])
        for mask in hidden:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
            assert int(mask.sum()) == height * width  # a full rectangle
            at_border = rows[0] == 0 or rows[-1] == H - 1 or columns[0] == 0 or columns[-1] == W - 1
            assert (height, width) == (4, 4) or at_border
            sizes[height, width] += 1
            touched += 1
    assert touched == 60 * B
    assert sizes[4, 4] > sizes.total() / 3
    assert len(sizes) > 4  # squares cut off at the border occur
    assert (batch()["image"] == given["image"]).all()  # the caller's batch is untouched


def test_mixup_is_the_formula():
    for seed in range(20):
        given = batch()
        found = Mixup(K, alpha=0.4)(given, seeded(seed))
        generator = seeded(seed)
        first, second = torch._standard_gamma(torch.full((2,), 0.4).double(), generator=generator).tolist()
        share = first / (first + second)
        other = torch.randperm(B, generator=generator)
        torch.testing.assert_close(found["image"], share * given["image"] + (1 - share) * given["image"][other])
        for member in range(B):
            expected = torch.zeros(K)
            expected[given["label"][member]] += share
            expected[given["label"][other[member]]] += 1 - share
            torch.testing.assert_close(found["label"][member], expected)
    torch.testing.assert_close(found["label"].sum(1), torch.ones(B))


def test_shares_are_those_of_the_beta_distribution():
    from scipy.stats import beta, kstest

    from vision3dgen.datasets.mixing import _beta

    generator = seeded()
    for alpha in (0.3, 1.0, 4.0):
        drawn = [_beta(alpha, generator) for _ in range(2000)]
        assert kstest(drawn, beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_labels_count_the_pixels_of_each_image():
    clipped = whole = 0
    for seed in range(60):
        given = batch()
        given["label"] = torch.arange(B)
        given["image"] = torch.arange(B).float().view(B, 1, 1, 1).expand(B, 3, H, W)
        found = CutMix(K)(given, seeded(seed))
        torch.testing.assert_close(found["label"].sum(1), torch.ones(B))
        for image, label in zip(found["image"], found["label"]):
            shares = torch.stack([(image[0] == value).float().mean() for value in range(K)])
            torch.testing.assert_close(label, shares)  # exactly as many pixels as the label says
        changed = (found["image"] != given["image"])[:, 0].any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        if len(rows):
            assert int(changed.sum()) == int(rows[-1] - rows[0] + 1) * int(columns[-1] - columns[0] + 1)
            whole += 1
            clipped += int(rows[0] == 0 or rows[-1] == H - 1)
    assert whole > 30
    assert clipped > 5


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_probabilities_can_be_mixed_again_and_torch_takes_them(name: str):
    mixing = MIXINGS[name](classes=K)
    once = mixing(batch(), seeded(1))
    twice = mixing(once, seeded(2))
    torch.testing.assert_close(twice["label"].sum(1), torch.ones(B))
    assert cross_entropy(torch.zeros(B, K), twice["label"]).item() == pytest.approx(torch.tensor(float(K)).log().item())
    assert twice["id"] == list("abcde")
    for again in (mixing(batch(), seeded(1)), mixing(batch(), seeded(1))):
        assert torch.equal(again["image"], once["image"])


def test_one_of_several():
    kinds = Counter()
    choose = OneOf([Cutout(3), Mixup(K)])
    for seed in range(40):
        kinds[choose(batch(), seeded(seed))["label"].ndim] += 1
    assert set(kinds) == {1, 2}
    assert min(kinds.values()) > 8


class Items:
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.full((3, H, W), float(index)), "label": torch.tensor(index)}


def test_mixing_while_collating_depends_on_the_batch_alone():
    def batches(workers: int) -> list[dict]:
        data = Data(Items(), 3, Mixed(collate, CutMix(K)), workers)
        loader = iter(make_loader(data, ShuffleSampler(6, seed=1, batch_size=3)))
        return [next(loader) for _ in range(4)]

    here, there = batches(0), batches(1)
    for left, right in zip(here, there):
        assert torch.equal(left["image"], right["image"])
        assert torch.equal(left["label"], right["label"])
    assert here[0]["label"].shape == (3, K)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="size must be at least 1"):
        Cutout(0)
    with pytest.raises(ValueError, match=r"classes must be at least 2 and alpha > 0, got classes=1, alpha=0.2"):
        Mixup(1)
    with pytest.raises(ValueError, match="alpha=0"):
        CutMix(3, alpha=0.0)
    with pytest.raises(ValueError, match="class numbers from 0 to 5"):
        Mixup(6)(batch())
    with pytest.raises(ValueError, match=r"or \(B, 6\) probabilities"):
        Mixup(6)({**batch(), "label": torch.ones(B, K) / K})
