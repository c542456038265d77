import pytest
import torch
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from priorguide.sample.agreement import Asked, as_pictures, as_texts, psnr, ssim


def test_psnr():
    target = torch.rand(3, 1, 4, 4)
    off = torch.tensor([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    assert psnr(target + off, target).tolist() == pytest.approx([20, 40, 100], abs=1e-3)
    with pytest.raises(ValueError, match=r"shape \(3, 1, 4, 4\), got \(2, 1, 4, 4\)"):
        psnr(target, target[:2])


@pytest.mark.parametrize("shape", [(5, 3, 32, 24), (70, 1, 6, 16)])
def test_ssim_is_torchmetrics(shape):
    a = torch.rand(shape)
    b = (0.7 * a + 0.3 * torch.rand(shape)).clamp(0, 1)
    wanted = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b), wanted, atol=1e-4, rtol=1e-4)
    assert ssim(a, a).tolist() == pytest.approx([1] * shape[0])


def test_small_pictures_have_no_ssim():
    small = torch.rand(3, 1, 5, 16)
    with pytest.raises(ValueError, match=r"at least 6 a side, got \(3, 1, 5, 16\)"):
        ssim(small, small)
    assert Asked(small).scores(small).keys() == {"psnr"}


def test_a_perceptual_distance_is_any_callable():
    target, pictures = torch.rand(5, 3, 12, 12), torch.rand(5, 3, 12, 12)
    sizes = []

    def perceptual(x, y):
        sizes.append(len(x))
        return (x - y).abs().mean((1, 2, 3))

    found = Asked(target, perceptual=perceptual, batch_size=2).scores(pictures)
    assert found.keys() == {"psnr", "ssim", "lpips"} and sizes == [2, 2, 1]
    torch.testing.assert_close(found["lpips"], (pictures - target).abs().mean((1, 2, 3)))
    clips = torch.stack([pictures, target], 2), torch.stack([target, target], 2)
    torch.testing.assert_close(Asked(clips[1], perceptual=perceptual).scores(clips[0])["lpips"], found["lpips"] / 2)
    assert Asked(target, perceptual=perceptual, metrics=["psnr"]).scores(pictures).keys() == {"psnr"}
    with pytest.raises(ValueError, match=r"a distance of each picture, \(5,\), got .*\[5, 1\]"):
        Asked(target, perceptual=lambda x, y: perceptual(x, y)[:, None]).scores(pictures)


def test_what_is_asked_must_fit():
    target = torch.rand(3, 1, 8, 8)
    with pytest.raises(ValueError, match="different numbers: {'target': 3, 'text': 2}"):
        Asked(target, text=["a", "b"])
    with pytest.raises(ValueError, match="must be lists of captions"):
        Asked(target, text="a b")
    with pytest.raises(ValueError, match="the conditions are 3, the pictures 4"):
        Asked(target).scores(torch.rand(4, 1, 8, 8))
    with pytest.raises(ValueError, match="perceptual network must be in eval mode"):
        Asked(target, perceptual=nn.PairwiseDistance().train())


def test_parts_of_a_batch_that_are_not_captions_or_pictures_are_left_out():
    assert as_texts(["a", "b"]) == ["a", "b"]
    assert as_texts(torch.zeros(2, 8)) is None and as_texts(None) is None and as_texts([1]) is None
    pictures = torch.rand(2, 3, 8, 8)
    assert as_pictures(pictures) is pictures
    for other in (torch.rand(2, 4, 8, 8), torch.rand(2, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), None):
        assert as_pictures(other) is None
