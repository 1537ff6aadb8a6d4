"""Several processes train and evaluate the same model as one."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_scripts import NAMES, table, weights


def torchrun(count: int, model: str, folder, digits_dir, *flags) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    words += [ROOT / f"run_{model}.py", "--data", "digits", "--data_dir", digits_dir, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def distance(a: dict, b: dict) -> float:
    """The norm of the difference over the norm of the weights: Adam may turn the rounding of a gradient that is nearly
    zero into a step of its own size, so single weights can differ by more than the whole does."""
    ours, theirs = (torch.cat([value.double().flatten() for value in weights.values()]) for weights in (a, b))
    return ((ours - theirs).norm() / ours.norm()).item()


@pytest.mark.parametrize("count, model", [(3, "vae"), (2, "ssvae"), (2, "fsvae")])
def test_several_processes_train_the_same_model_as_one(count, model, tmp_path, digits_dir, script):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    flags = ("--iter_max", 20, "--batch_size", 100)
    alone = script(model, *flags, cwd=one)
    together = torchrun(count, model, many, digits_dir, *flags)
    assert together.returncode == 0, together.stderr
    assert distance(weights(one, NAMES[model], 20), weights(many, NAMES[model], 20)) < 1e-4
    for row, wanted in zip(table(many, NAMES[model]), table(one, NAMES[model]), strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx(
            {k: float(v) for k, v in wanted.items()}, rel=1e-4
        )
    figures = [float(run.stdout.strip().splitlines()[-1].split(": ")[1].split(". ")[0]) for run in (alone, together)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    assert together.stdout.count("trained to step") == 1  # the first process alone speaks


def test_evaluation_shares_the_samples_and_a_run_goes_on_with_another_number_of_processes(tmp_path, digits_dir, script):
    assert script("gmvae", "--iter_max", 10).returncode == 0
    assert torchrun(2, "gmvae", tmp_path, digits_dir, "--iter_max", 20).returncode == 0
    flags = ("--iter_max", 20, "--train", 0, "--iw", 10, 100, 1000)
    alone, together = script("gmvae", *flags), torchrun(3, "gmvae", tmp_path, digits_dir, *flags)
    for ours, wanted in zip(together.stdout.splitlines()[-4:], alone.stdout.splitlines()[-4:], strict=True):
        assert float(ours.split(": ")[-1]) == pytest.approx(float(wanted.split(": ")[-1]), rel=1e-4)


def test_a_process_that_dies_ends_all_and_the_run_goes_on(tmp_path, digits_dir, script):
    code = (
        "import os, signal, sys; from codebase import train; import run_vae\n"
        "step = train.Step.__call__\n"
        "def mortal(self, index):\n"
        "    mortal.count += 1\n"
        "    if os.environ['RANK'] == '1' and mortal.count == 60: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(self, index)\n"
        "mortal.count = 0; train.Step.__call__ = mortal; sys.exit(run_vae.main())"
    )
    (tmp_path / "mortal.py").write_text(code)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "mortal.py"]
    words += ["--data", "digits", "--data_dir", str(digits_dir), "--iter_max", "100", "--iter_save", "50"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "another process of this run died" in result.stderr
    assert script("vae", "--iter_max", 100).returncode == 0
    assert len(table(tmp_path, NAMES["vae"])) == 1


def test_a_batch_smaller_than_the_number_of_processes_is_refused(tmp_path, digits_dir):
    result = torchrun(2, "vae", tmp_path, digits_dir, "--iter_max", 5, "--batch_size", 1)
    assert result.returncode != 0 and result.stderr.count("takes at least one image per process") == 1
