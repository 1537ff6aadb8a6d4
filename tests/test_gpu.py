"""A few promises on CUDA: pytest --gpu -n 0 tests/test_gpu.py. Without --gpu tests see no GPU."""

import pytest
import torch
from conftest import NAMES, ROOT, SHIPPED, lines, needs_cuda, same, table, weights
from untrained import KINDS

from codebase import checkpoint, data, evaluate
from codebase.models.vae import VAE

pytestmark = needs_cuda


@pytest.mark.parametrize("model", NAMES)
def test_a_model_trains_and_loads_on_cuda(model, script, tmp_path):
    """auto takes the GPU, the checkpoint is of the CPU, and what is loaded is what was trained."""
    trained = lines(script(model, "--iter_max", 30))
    assert any(" parameters on cuda (" in line for line in trained)
    stored = weights(tmp_path, NAMES[model], 30)
    assert {value.device.type for value in stored.values()} == {"cpu"}
    loaded = lines(script(model, "--iter_max", 30, "--train", 0))
    assert trained[-1] in loaded


@pytest.mark.parametrize("compiled", [0, 1])
@pytest.mark.parametrize("model", ["vae", "ssvae"])
def test_parts_on_cuda_are_one_piece(model, compiled, script, tmp_path):
    """Bit for bit."""
    for folder, stops in {"whole": [30], "parts": [10, 30]}.items():
        (tmp_path / folder).mkdir()
        for stop in stops:
            flags = ["--compile", compiled, "--iter_max", stop]
            printed = lines(script(model, *flags, cwd=tmp_path / folder))
            kind = "recorded" if compiled else "plain"
            assert any(line.startswith(f"steps: {kind}") for line in printed), printed
    whole = weights(tmp_path / "whole", NAMES[model], 30)
    assert same(whole, weights(tmp_path / "parts", NAMES[model], 30))
    assert not same(whole, weights(tmp_path / "parts", NAMES[model], 10))
    assert table(tmp_path / "whole", NAMES[model]) == table(tmp_path / "parts", NAMES[model])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("model", NAMES)
def test_the_recorded_step_has_the_plain_ones_bits(model, schedule, script, tmp_path):
    trained = {}
    for compiled in [0, 1]:
        folder = tmp_path / str(compiled)
        folder.mkdir()
        flags = ["--compile", compiled, "--schedule", schedule, "--iter_max", 30]
        lines(script(model, *flags, cwd=folder))
        (path,) = folder.glob("checkpoints/*/model-00030.pt")
        trained[compiled] = torch.load(path, weights_only=True)
    assert same(trained[0], trained[1])


@pytest.mark.parametrize("model", ["vae", "gmvae"])
def test_bounds_on_cuda_agree_with_the_cpus(model, monkeypatch):
    """Of the weights that come with the code, and on the same noise."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "rows_at_once", lambda model: 1000)
    name = SHIPPED[model].split("/")[0]
    x = data.test_subset(data.course("test"))
    found = {}
    for device in ("cpu", "cuda"):
        noise = torch.Generator().manual_seed(1)

        def from_cpu(m, noise=noise):
            return torch.randn(m.shape, generator=noise).to(m.device)

        monkeypatch.setattr(torch, "randn_like", from_cpu)
        loaded = checkpoint.load_model_by_name(KINDS[model](name=name), 20_000, device)
        found[device] = evaluate.bounds(loaded, x.to(device), ms=[1, 10, 100, 1000])
    for bound in ("nelbo", "kl", "rec", "niwae_1", "niwae_10", "niwae_100", "niwae_1000"):
        assert found["cuda"][bound] == pytest.approx(found["cpu"][bound], abs=0.05)


def test_evaluation_keeps_the_random_numbers_of_every_gpu():
    """The model is on the last one, which need not be the current one."""
    devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    before = [torch.cuda.get_rng_state(device) for device in devices]
    model = VAE().to(devices[-1])
    x = torch.zeros(3, 784, device=devices[-1])
    first = evaluate.bounds(model, x, ms=[1])
    for device, state in zip(devices, before, strict=True):
        assert torch.equal(torch.cuda.get_rng_state(device), state)
    torch.rand(5, device=devices[-1])
    assert evaluate.bounds(model, x, ms=[1]) == first
