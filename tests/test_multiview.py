import pytest
import torch

from vision3dgen.backbones import MultiViewEncoder, R2N2Encoder, resnet20


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return MultiViewEncoder(resnet20(widths=(4, 6, 8)), code_channels=13, state_channels=5, size=4, grid=2).eval()


def views(*shape):
    return torch.rand(*shape, 3, 17, 19, generator=torch.Generator().manual_seed(len(shape)))


def test_the_papers_sizes():
    trunk = R2N2Encoder()
    with torch.no_grad():
        maps = trunk(torch.rand(1, 3, 127, 127))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (96, 64, 64), (128, 33, 33), (256, 17, 17), (256, 9, 9), (256, 5, 5), (256, 3, 3)
    ]  # fmt: skip
    encoder = MultiViewEncoder(trunk)
    assert encoder.fc.in_features == 2304
    assert encoder.fc.out_features == 1024
    with torch.no_grad():
        assert encoder(torch.rand(2, 1, 3, 127, 127))[0].shape == (2, 128, 4, 4, 4)


def test_every_parameter_gets_a_gradient(encoder):
    encoder.train()(views(2, 3))[0].sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    encoder.eval()


@torch.no_grad()
def test_objects_with_fewer_views_are_as_on_their_own(encoder):
    x = views(3, 4)
    lengths = torch.tensor([4, 1, 2])
    (out,) = encoder(x, lengths)
    for index, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(out[index], encoder(x[index : index + 1, :length])[0][0])
    x[1, 1:] = torch.nan
    assert torch.equal(encoder(x, lengths)[0], out)


@torch.no_grad()
def test_padding_stays_out_of_the_statistics_of_training():
    first, second = (
        MultiViewEncoder(resnet20(widths=(4, 6, 8)), code_channels=13, state_channels=5, grid=2) for _ in "ab"
    )
    second.load_state_dict(first.state_dict())
    x = views(2, 3)
    lengths = torch.tensor([1, 3])
    first.train()(x, lengths)
    second.train()(
        torch.where(torch.arange(3)[:, None, None, None] < lengths[:, None, None, None, None], x, 9.0), lengths
    )
    assert torch.equal(first.trunk.bn1.running_mean, second.trunk.bn1.running_mean)


@torch.no_grad()
def test_each_view_changes_the_volume_and_so_does_their_order(encoder):
    x = views(1, 3)
    (whole,) = encoder(x)
    assert not torch.allclose(whole, encoder(x[:, :2])[0], atol=1e-4)
    assert not torch.allclose(whole, encoder(x.flip(1))[0], atol=1e-5)
    state = encoder.gru.cell(encoder.codes(x)[:, 0])  # the recurrence, step by step
    for view in (1, 2):
        state = encoder.gru.cell(encoder.codes(x)[:, view], state)
    torch.testing.assert_close(whole, state)


def test_views_it_cannot_take_are_refused(encoder):
    with pytest.raises(ValueError, match=r"from 1 to 3 views, got \[0, 3\]"):
        encoder(views(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"from 1 to 3 views, got \[4, 3\]"):
        encoder(views(2, 3), torch.tensor([4, 3]))
    with pytest.raises(ValueError, match="at least one view"):
        encoder(views(2, 0))
    with pytest.raises(ValueError, match="of 3 channels"):
        encoder(views(2, 3)[:, :, :2])
    with pytest.raises(ValueError, match="build it without"):
        MultiViewEncoder(resnet20(num_classes=3))
