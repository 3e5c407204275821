"""Classifiers and their losses against formulas and loops, and what they say to bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests import naive
from vision3dgen.backbones import BACKBONES, resnet20
from vision3dgen.config import ConfigError
from vision3dgen.experiment import Weights
from vision3dgen.losses import multiclass_hinge, softmax_cross_entropy
from vision3dgen.models import Classifier, FullyConnected, LinearClassifier, NearestNeighbors


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes(count, limit, seed=1):
    return torch.randint(limit, (count,), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("margin", [1.0, 0.25])
def test_hinge_loss_and_gradient_are_the_formula(margin):
    scores, labels = (4 * rand(11, 7) - 2).requires_grad_(), classes(11, 7)
    losses = multiclass_hinge(scores, labels, margin)
    losses.sum().backward()
    expected, gradient = naive.hinge(scores.detach(), labels, margin)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(scores.grad, gradient)
    assert torch.autograd.gradcheck(lambda s: multiclass_hinge(s, labels, margin), scores)


def test_softmax_loss_and_gradient_are_the_formula():
    scores, labels = (4 * rand(11, 7) - 2).requires_grad_(), classes(11, 7)
    losses = softmax_cross_entropy(scores, labels)
    losses.sum().backward()
    probability = scores.detach().exp() / scores.detach().exp().sum(1, keepdim=True)
    torch.testing.assert_close(losses.detach(), -probability[torch.arange(11), labels].log())
    torch.testing.assert_close(scores.grad, probability - F.one_hot(labels, 7))


def test_labels_may_be_probabilities_for_softmax_only():
    scores, one, two = rand(5, 7), classes(5, 7, 1), classes(5, 7, 2)
    mixed = 0.3 * F.one_hot(one, 7).double() + 0.7 * F.one_hot(two, 7).double()
    expected = 0.3 * softmax_cross_entropy(scores, one) + 0.7 * softmax_cross_entropy(scores, two)
    torch.testing.assert_close(softmax_cross_entropy(scores, mixed), expected)
    with pytest.raises(ValueError, match="takes classes as labels, not probabilities"):
        multiclass_hinge(scores, mixed)
    with pytest.raises(ValueError, match=r"must be \(5, 7\), got \(5, 3\)"):
        softmax_cross_entropy(scores, mixed[:, :3])


def test_shifting_all_scores_changes_neither_loss():
    scores, labels = rand(11, 7), classes(11, 7)
    for loss in (softmax_cross_entropy, multiclass_hinge):
        torch.testing.assert_close(loss(scores + 13.0, labels), loss(scores, labels))


@pytest.mark.parametrize("loss", [softmax_cross_entropy, multiclass_hinge])
@pytest.mark.parametrize("bad, index", [(7, 3), (-1, 0)])
def test_labels_out_of_range_are_named(loss, bad, index):
    labels = classes(5, 7)
    labels[index] = bad
    with pytest.raises(ValueError, match=rf"labels must be 0 to 6 for 7 classes, got {bad} at {index}"):
        loss(rand(5, 7), labels)


def test_labels_of_another_number_are_an_error():
    with pytest.raises(ValueError, match=r"labels must be \(5,\).*got \(4,\)"):
        softmax_cross_entropy(rand(5, 7), classes(4, 7))
    with pytest.raises(ValueError, match="margin must be > 0, got 0"):
        multiclass_hinge(rand(5, 7), classes(5, 7), 0.0)


# ------------------------------------------------------------------------------------------------------- models


def make_models(loss="softmax", count=11):
    torch.manual_seed(0)
    shape = (3, 8, 8)
    return [
        LinearClassifier(shape, count, loss=loss),
        FullyConnected([13, 17], shape, count, loss=loss, dropout=0.5),
        Classifier(resnet20(widths=(4, 8, 16)), count, loss=loss, dropout=0.5),
    ]


@pytest.mark.parametrize("loss, initial", [("softmax", math.log(11)), ("hinge", 10.0)])
@pytest.mark.parametrize("index", range(3))
def test_the_first_loss_is_that_of_no_preference(loss, initial, index):
    model = make_models(loss)[index]
    batch = {"image": rand(19, 3, 8, 8, dtype=torch.float32), "label": classes(19, 11)}
    terms = model.loss(batch)
    assert terms["loss"].item() == pytest.approx(initial, rel=0.02)
    terms["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("loss", ["softmax", "hinge"])
@pytest.mark.parametrize("index", range(3))
def test_predictions_and_validation_agree_with_the_scores(loss, index):
    model = make_models(loss)[index].eval()
    batch = {"image": rand(19, 3, 8, 8, dtype=torch.float32), "label": classes(19, 11)}
    scores = model(batch["image"]).detach()
    predicted = model.predict(batch)
    assert torch.equal(predicted.argmax(1), scores.argmax(1))
    torch.testing.assert_close(predicted.exp().sum(1) if loss == "softmax" else predicted,
                               torch.ones(19) if loss == "softmax" else scores)  # fmt: skip
    measured = model.validation_metrics(batch)
    assert measured["accuracy"].tolist() == (scores.argmax(1) == batch["label"]).float().tolist()
    torch.testing.assert_close(measured["loss"].mean(), model.loss(batch)["loss"].detach())


def test_a_template_is_what_its_class_looks_for():
    model = LinearClassifier((1, 5, 7), 3, mean=[0.2], std=[0.5])
    images = rand(4, 1, 5, 7, dtype=torch.float32)
    templates = model.templates()
    assert templates.shape == (3, 1, 5, 7)
    expected = torch.einsum("bchw,kchw->bk", (images - 0.2) / 0.5, templates) + model.fc.bias
    torch.testing.assert_close(model(images), expected)


def test_gradient_descent_separates_what_can_be_separated():
    """The loss of both linear classifiers reaches what margins allow on three points at the corners of a simplex."""
    images = torch.eye(3).view(3, 1, 1, 3)
    for loss in ("softmax", "hinge"):
        model = LinearClassifier((1, 1, 3), 3, loss=loss)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(200):
            optimizer.zero_grad()
            value = model.loss({"image": images, "label": torch.arange(3)})
            value["loss"].backward()
            optimizer.step()
        assert value["accuracy"] == 1
        assert value["loss"].item() < (0.02 if loss == "softmax" else 1e-6)


def test_normalization_is_the_models_business():
    image = rand(2, 3, 8, 8, dtype=torch.float32)
    plain = make_models()[0]
    normal = LinearClassifier((3, 8, 8), 11, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    normal.fc = plain.fc
    shifted = (image - normal.mean) / normal.std * 0.5 + 0.5
    torch.testing.assert_close(normal(image), plain(shifted))


def test_a_backbone_may_bring_its_own_classifier():
    backbone = BACKBONES["lenet5"](num_classes=10)
    model = Classifier(backbone, 10, mean=(0.0,), std=(1.0,))
    assert model.fc is None
    images = rand(2, 1, 28, 28, dtype=torch.float32)
    torch.testing.assert_close(model(images), backbone.logits(images))
    with pytest.raises(ValueError, match="a classifier of 10 classes, the model is to have 7"):
        Classifier(backbone, 7)


@pytest.mark.parametrize("index", range(3))
def test_images_of_another_kind_are_refused(index):
    model = make_models()[index]
    with pytest.raises(ValueError, match=r"3.*got \(2, 1, 8, 8\)"):
        model(rand(2, 1, 8, 8, dtype=torch.float32))
    if index < 2:
        with pytest.raises(ValueError, match=r"takes images \('B', 3, 8, 8\), got \(2, 3, 8, 7\)"):
            model(rand(2, 3, 8, 7, dtype=torch.float32))


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\).*got \(2, 1, 8, 8\)"):
        LinearClassifier((1, 8, 8), 2, mean=[0.5] * 3, std=[0.5] * 3)(rand(2, 1, 8, 8, dtype=torch.float32))
    with pytest.raises(ValueError, match="unknown loss 'svm'; choose from"):
        LinearClassifier(loss="svm")
    with pytest.raises(ValueError, match="std > 0"):
        LinearClassifier(std=[0.0], mean=[0.0])
    with pytest.raises(ValueError, match="unknown activation 'rely'"):
        FullyConnected(activation="rely")


def test_a_batch_of_one_with_batch_norm_says_what_to_do():
    model = Classifier(resnet20(widths=(4, 8, 16)), 3)
    with pytest.raises(ValueError, match="use two images or more, a larger image, or eval"):
        model(rand(1, 3, 4, 4, dtype=torch.float32))
    assert model.eval()(rand(1, 3, 4, 4, dtype=torch.float32)).shape == (1, 3)


# ------------------------------------------------------------------------------------------- nearest neighbors


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("k", [1, 2, 5, 23])
def test_nearest_neighbors_are_those_of_loops(metric, k):
    # Small integers: many equal distances, exact in any arithmetic.
    train = (rand(23, 1, 2, 3) * 3).floor() + (metric == "cosine")
    queries = (rand(13, 1, 2, 3, seed=5) * 3).floor() + (metric == "cosine")
    train[7] = train[3]
    labels = classes(23, 4)
    model = NearestNeighbors(train, labels, 4, k=k, metric=metric)
    predicted, order = naive.nearest_neighbors(train, labels, queries, k, metric, 4)
    assert model.scores(queries).argmax(1).tolist() == predicted
    if metric != "cosine":  # whose equal distances are equal up to rounding only
        assert model.neighbors(queries).indices.tolist() == order


def test_memory_does_not_change_what_is_found():
    train, labels, queries = rand(31, 7), classes(31, 3), rand(17, 7, seed=3)
    whole = NearestNeighbors(train, labels, 3, k=5).neighbors(queries)
    for memory in (1, 31 * 8 * 3 * 4):
        pieces = NearestNeighbors(train, labels, 3, k=5, memory=memory).neighbors(queries)
        assert torch.equal(pieces.indices, whole.indices)
        assert torch.equal(pieces.distances, whole.distances)
    assert NearestNeighbors(train, labels, 3, k=5).scores(queries[:0]).shape == (0, 3)


def test_equal_images_are_at_distance_zero_and_in_training_order():
    train = rand(53, 1, 28, 28, dtype=torch.float32)
    train[41] = train[11]
    labels = torch.arange(53) % 10
    found = NearestNeighbors(train, labels, 10, k=2).neighbors(train[[11]])
    assert found.distances.tolist() == [[0, 0]]
    assert found.indices.tolist() == [[11, 41]]


def test_a_tie_of_votes_goes_to_the_nearer_class():
    train = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    model = NearestNeighbors(train, torch.tensor([2, 0, 0, 2]), 3, k=4)
    assert model.scores(torch.tensor([[0.1]])).argmax(1).tolist() == [2]
    assert model.scores(torch.tensor([[1.4]])).argmax(1).tolist() == [0]
    assert model.scores(torch.tensor([[0.1]]))[0, 1] == 0  # no vote, no fraction


def test_gathering_batches_is_the_same_as_all_at_once():
    train, labels = rand(7, 5), classes(7, 3)
    batches = [{"image": train[i : i + 3], "label": labels[i : i + 3]} for i in (0, 3, 6)]
    model = NearestNeighbors.gather(batches, 3, k=3)
    batch = {"image": rand(4, 5, seed=9)}
    assert torch.equal(model.predict(batch), NearestNeighbors(train, labels, 3, k=3).scores(batch["image"]))
    with pytest.raises(ValueError, match="at least one training batch"):
        NearestNeighbors.gather([], 3)


def test_bad_input_to_nearest_neighbors_is_named():
    train, labels = rand(7, 5), classes(7, 3)
    for k in (0, 8):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 7 training images, got {k}"):
            NearestNeighbors(train, labels, 3, k=k)
    with pytest.raises(ValueError, match="unknown metric 'l3'; choose from"):
        NearestNeighbors(train, labels, 3, metric="l3")
    with pytest.raises(ValueError, match=r"images must be \('B', 5\), as in training, got \(2, 4\)"):
        NearestNeighbors(train, labels, 3).scores(rand(2, 4))
    with pytest.raises(ValueError, match="labels must be 0 to 1 for 2 classes, got 2 at"):
        NearestNeighbors(train, torch.tensor([0, 1, 2, 0, 0, 0, 0]), 2)
    train[3] = 0
    with pytest.raises(ValueError, match="training image 3 is 0 everywhere: it has no cosine"):
        NearestNeighbors(train, labels, 3, metric="cosine")


# ------------------------------------------------------------------------------------------------ first weights


def test_weights_of_a_backbone_load_from_published_files(tmp_path):
    source = resnet20(widths=(4, 8, 16), num_classes=5)
    torch.save(source.state_dict(), tmp_path / "published.pth")
    target = Classifier(resnet20(widths=(4, 8, 16)), 7)
    Weights(tmp_path / "published.pth").load(target, "backbone")
    for name, value in target.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_weights_of_another_architecture_are_named(tmp_path):
    torch.save(resnet20(widths=(4, 8, 16)).state_dict(), tmp_path / "small.pt")
    target = Classifier(resnet20(widths=(8, 16, 32)), 3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"small.pt: not the weights.*conv1.weight \(4, 3, 3, 3\) for \(8"):
        Weights(tmp_path / "small.pt").load(target, "backbone")
    with pytest.raises(ConfigError, match=r"no part 'trunk'; it has \['backbone', 'dropout', 'fc'\]"):
        Weights(tmp_path / "small.pt").load(target, "trunk")
    with pytest.raises(OSError, match=r"none.pt"):
        Weights(tmp_path / "none.pt").load(target, "backbone")
    with pytest.raises(ConfigError, match="has no checkpoint: train it first"):
        Weights(tmp_path).load(target, "backbone")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
