"""The Inception-v3 of FID against torch-fidelity's, on the same weights, by way of their pickle."""

import importlib.util
import shlex
import subprocess
import sys
import types

from etils import epath
import jax
import numpy as np
import pytest
import torch

from t2i_jax.interop.inception import convert_command, load_inception


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """torch-fidelity's extractor with random weights, and the pickle of these.

    Its package imports torchvision for other networks: of it, only what this one needs is run.
    """
    package = types.ModuleType("torch_fidelity")
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):
        """Activations stay near one, and no statistic of a norm is trivial."""

        def load_state_dict(self, _):
            generator = torch.Generator().manual_seed(0)
            for name, x in self.state_dict().items():
                if name.endswith(("bn.weight", "bn.running_var")):
                    x.uniform_(0.5, 1.5, generator=generator)
                elif name.endswith(("bn.bias", "bn.running_mean")):
                    x.normal_(0.0, 0.3, generator=generator)
                elif name.endswith("conv.weight"):
                    deviation = (2 / x[0].numel()) ** 0.5
                    x.normal_(0.0, deviation, generator=generator)

    pickle = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save({}, pickle)
    model = Random("inception", ["2048"], feature_extractor_weights_path=pickle)
    torch.save(model.state_dict(), pickle)
    return model, pickle


def test_inception(theirs):
    model, pickle = theirs
    with pytest.raises(ValueError, match="convert it where PyTorch is installed") as error:
        load_inception(pickle)
    command = str(error.value).splitlines()[-1].strip()
    assert command == convert_command(epath.Path(pickle)) and command.startswith("python ")
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    net, params = load_inception(pickle.with_suffix(".safetensors"))

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 299, 299, 3), np.uint8)
    images[1] = np.linspace(0, 255, 299)[:, None, None]  # smooth
    images[2, :, 150:] = 255  # an edge, and a flat half
    with torch.no_grad():
        (expected,) = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    expected = expected.numpy()
    run = jax.jit(net.apply)
    features = np.asarray(run({"params": params}, images))
    assert features.shape == (3, 2048) and features.dtype == np.float32
    errors = np.linalg.norm(features - expected, axis=1) / np.linalg.norm(expected, axis=1)
    print(f"relative errors {errors}, features {expected.mean():.2f} +- {expected.std():.2f}")
    assert errors.max() <= 1e-5
    floats = np.asarray(run({"params": params}, images.astype(np.float32)))
    np.testing.assert_allclose(floats, features, rtol=1e-4, atol=1e-5)
