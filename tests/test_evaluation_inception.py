import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.evaluation import write_random_inception_weights
from tarflow_jax.evaluation.inception import inception_network, resize_like_tensorflow1


def test_resize_of_known_pixels():
    # TensorFlow 1 reads coordinate i * 2 / 4 = 0, 0.5, 1, 1.5, and repeats the border.
    image = jnp.array([[0.0, 4.0], [8.0, 12.0]])[None, :, :, None]
    rows = np.array(resize_like_tensorflow1(image, size=4)[0, :, :, 0])
    np.testing.assert_array_equal(rows[0], [0, 2, 4, 4])
    np.testing.assert_array_equal(rows[:, 0], [0, 4, 8, 8])


@pytest.mark.parametrize("size", [28, 64, 299, 400])
def test_resize_equals_torch_fidelity(size):
    import torch
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = np.random.default_rng(0).integers(0, 256, (2, size, size + 3, 3)).astype(np.float32)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(
        torch.tensor(images.transpose(0, 3, 1, 2)), size=(299, 299), align_corners=False
    )
    ours = resize_like_tensorflow1(jnp.asarray(images))
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.slow
def test_features_equal_torch_fidelity(tmp_path):
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path / "random.pth"
    write_random_inception_weights(path)
    reference = FeatureExtractorInceptionV3(
        "reference", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
    )
    spatial = []
    reference.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: spatial.append(output))
    images = np.random.default_rng(1).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        pooled, logits = reference(torch.tensor(images.transpose(0, 3, 1, 2)))

    network = inception_network(path)
    assert "NOT the published weights" in network.identity
    ours = network(images)
    flat = spatial[0][:, :7].numpy().transpose(0, 2, 3, 1).reshape(3, -1)
    for mine, theirs in ((ours.pooled, pooled.numpy()), (ours.logits, logits.numpy()), (ours.spatial, flat)):
        assert mine.shape == theirs.shape
        assert np.linalg.norm(mine - theirs) <= 1e-4 * np.linalg.norm(theirs - theirs.mean(0))


def test_files_that_are_not_inception_are_refused(tmp_path):
    import torch

    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05"):
        inception_network(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="not a plain PyTorch state dict"):
        inception_network(tmp_path / "text.pth")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="layers or their shapes differ"):
        inception_network(tmp_path / "other.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no such tensor 'fc\.weight'"):
        inception_network(tmp_path / "other.pth")


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    import torch

    torch.save({"fc.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a plain PyTorch state dict"):
        inception_network(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out
