"""The four scripts through their real command lines: what they print, store, refuse and go on from."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, tree

from codebase import digits

NUMBER = r"-?\d+\.\d+(e-?\d+)?"
NAMES = {
    "vae": "model=vae_z=10_data=digits_run=0000",
    "gmvae": "model=gmvae_z=10_k=500_data=digits_run=0000",
    "ssvae": "model=ssvae_gw=001_cw=100_data=digits_run=0000",
    "fsvae": "model=fsvae_data=digits_run=0000",
}
PICTURES = {
    "vae": {"samples.png", "reconstructions.png", "curves.png"},
    "gmvae": {"samples.png", "reconstructions.png", "curves.png"},
    "ssvae": {"confusion.png", "styles.png", "curves.png"},
    "fsvae": {"samples.png", "samples-0000060.png", "samples-0000100.png", "curves.png"},
}


def lines(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


@pytest.mark.parametrize("model", NAMES)
def test_a_model_trains_then_loads_and_leaves_what_the_contract_names(model, script, process, tmp_path):
    trained = lines(process(model, "--iter_max", 100, "--iter_save", 60))
    loaded = lines(script(model, "--iter_max", 100, "--train", 0))
    last = r"Test set classification accuracy: 0\.\d+" if model == "ssvae" else (
        rf"NELBO: {NUMBER}. KL: {NUMBER}. Rec: {NUMBER}"
    )  # fmt: skip
    assert re_match(last, trained[-1])
    if model in ("vae", "gmvae"):
        assert re_match(last, loaded[-5])
        for m, line in zip((1, 10, 100, 1000), loaded[-4:], strict=True):
            assert re_match(rf"Negative IWAE-{m}: {NUMBER}", line)
    else:
        assert loaded[-1] == trained[-1]
    logs, checkpoints = (tmp_path / folder / NAMES[model] for folder in ("logs", "checkpoints"))
    assert {path.name for path in checkpoints.iterdir()} == {"model-00060.pt", "model-00100.pt", "state.pt"}
    assert {path.name for path in logs.glob("*.png")} == PICTURES[model]
    assert "drawn digits" in json.loads((logs / "results.json").read_text())["data"]
    assert json.loads((logs / "config.json").read_text())["batch_size"] == 100
    rows = list(csv.DictReader((logs / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["100"] and {"loss", "nelbo", "kl", "rec", "seconds"} <= set(rows[0])


def re_match(pattern: str, line: str) -> bool:
    assert re.fullmatch(pattern, line), line
    return True


def test_the_results_of_evaluation_join_those_of_training(script, tmp_path):
    script("ssvae", "--gw", 0, "--iter_max", 20)
    results = json.loads((tmp_path / "logs/model=ssvae_gw=000_cw=100_data=digits_run=0000/results.json").read_text())
    assert set(results["figures"]) == {"accuracy"} and len(results["confusion"]) == 10
    assert sum(map(sum, results["confusion"])) == 10_000 and len(results["per_digit_accuracy"]) == 10


def test_help_answers_in_half_a_second_without_loading_torch():
    best = min(_seconds([*command("vae"), "--help"]) for _ in range(3))
    code = "import sys, run_vae; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert best < 3  # 0.05 s on an idle machine; speed itself is the benchmark's


def _seconds(words) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - began


def weights(folder: Path, name: str, step: int) -> dict:
    return torch.load(folder / "checkpoints" / name / f"model-{step:05d}.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def table(folder: Path, name: str) -> list[dict]:
    """metrics.csv without the one column that no two runs share."""
    with (folder / "logs" / name / "metrics.csv").open() as file:
        return [{key: row[key] for key in row if key != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("model", NAMES)
def test_going_on_equals_never_having_stopped_bit_for_bit(model, script, tmp_path):
    first, second = tmp_path / "whole", tmp_path / "parts"
    for folder in (first, second):
        folder.mkdir()
    script(model, "--iter_max", 200, cwd=first)
    for stop in (100, 200):
        assert script(model, "--iter_max", stop, cwd=second).returncode == 0
    assert same(weights(first, NAMES[model], 200), weights(second, NAMES[model], 200))
    assert table(first, NAMES[model]) == table(second, NAMES[model])
    one, two = (torch.load(folder / "checkpoints" / NAMES[model] / "state.pt") for folder in (first, second))
    for number, moments in one["optimizer"].items():
        assert same(moments, two["optimizer"][number])
    assert same(one["random"], two["random"])


def test_a_finished_run_is_evaluated_and_not_trained_again(script, tmp_path):
    first = lines(script("vae", "--iter_max", 20))
    before = tree(tmp_path / "checkpoints")
    again = lines(script("vae", "--iter_max", 20))
    assert again[-1] == first[-1] and any("trained before" in line for line in again)
    assert tree(tmp_path / "checkpoints") == before


def test_overwrite_starts_over(script, tmp_path):
    script("vae", "--iter_max", 20)
    assert script("vae", "--iter_max", 10, "--overwrite", 1).returncode == 0
    assert {path.name for path in (tmp_path / "checkpoints" / NAMES["vae"]).iterdir()} == {"model-00010.pt", "state.pt"}


def test_settings_that_contradict_the_stored_run_are_refused(script, tmp_path):
    script("vae", "--iter_max", 20)
    before = tree(tmp_path)
    result = script("vae", "--iter_max", 30, "--batch_size", 50)
    assert result.returncode == 2 and "--batch_size" in result.stderr and "100, not 50" in result.stderr
    result = script("vae", "--iter_max", 10)
    assert result.returncode == 2 and "[20]" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and tree(tmp_path) == before


def test_runs_and_seeds_give_different_weights_and_the_same_seed_the_same(script, tmp_path):
    for flags in (["--run", 0], ["--run", 1], ["--run", 2, "--seed", 0]):
        assert script("vae", "--iter_max", 10, *flags).returncode == 0
    zero, one, two = (weights(tmp_path, NAMES["vae"].replace("0000", f"000{run}"), 10) for run in range(3))
    assert same(zero, two) and not same(zero, one)


def test_loading_without_a_checkpoint_names_it_what_there_is_and_what_to_type(script, tmp_path):
    script("vae", "--iter_max", 10)
    before = tree(tmp_path)
    result = script("vae", "--iter_max", 30, "--train", 0)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    for word in ("model-00030.pt", "checkpoints of this run: 10", "to train one: run_vae.py", "--iter_max 30"):
        assert word in result.stderr
    assert "--train" not in result.stderr and tree(tmp_path) == before


def test_beta_weighs_the_kl_term_and_is_part_of_the_name(script, tmp_path):
    script("vae", "--iter_max", 100, "--beta", 4)
    rows = table(tmp_path, NAMES["vae"].replace("_data", "_beta=4_data"))
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[0]["rec"]) + 4 * float(rows[0]["kl"]), rel=1e-5)
    assert float(rows[0]["nelbo"]) == pytest.approx(float(rows[0]["rec"]) + float(rows[0]["kl"]), rel=1e-5)


def test_iwae_with_more_samples_needs_no_more_memory(script, tmp_path):
    script("vae", "--iter_max", 10)
    code = (
        "import resource, sys, run_vae; assert run_vae.main(sys.argv[1:]) == 0;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for m in ("1000", "5000"):
        words = [sys.executable, "-c", code, "--data", "digits", "--iter_max", "10", "--train", "0", "--iw", m]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert f"Negative IWAE-{m}:" in found.stdout
        peaks.append(int(found.stdout.split()[-1]))
    assert peaks[1] < peaks[0] * 1.1


def test_auto_takes_drawn_digits_where_there_is_no_mnist_and_says_so(script, tmp_path, digits_dir, monkeypatch):
    place = tmp_path / "no mnist"
    place.mkdir()
    digits.load(str(digits_dir), "train", "grey"), digits.load(str(digits_dir), "test", "grey")
    for stored in digits_dir.glob("drawn-grey-*.npz"):  # drawing them is not what is tested here
        (place / stored.name).symlink_to(stored)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    result = script("vae", "--iter_max", 5, "--data", "auto", "--data_dir", place)
    assert result.returncode == 0, result.stderr
    assert "NO MNIST" in result.stdout and "DRAWN DIGITS" in result.stdout
    assert (tmp_path / "logs" / NAMES["vae"]).is_dir() and not list(place.glob(".download*"))
    result = script("vae", "--iter_max", 5, "--data", "mnist", "--data_dir", place)
    assert result.returncode == 2 and "train-images-idx3-ubyte" in result.stderr and "by hand" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_replicates_are_summarised_and_a_failed_run_is_reported(script, tmp_path):
    broken = tmp_path / "checkpoints" / NAMES["vae"].replace("run=0000", "run=0001")
    broken.mkdir(parents=True)
    (broken / "state.pt").write_bytes(b"nothing that can be read")
    result = script("vae", "--iter_max", 20, "--runs", 3)
    assert result.returncode == 2 and "run=0001" in result.stderr
    summary = json.loads((tmp_path / "logs/model=vae_z=10_data=digits_summary.json").read_text())
    assert summary["runs"] == [0, 2] and len(summary["each"]) == 2
    values = [figures["nelbo"] for figures in summary["each"]]
    assert summary["figures"]["nelbo"]["mean"] == pytest.approx(sum(values) / 2)
    assert summary["figures"]["nelbo"]["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2)


# Every flag with what it does not take: (script, flags, a word of the line)
BAD = [
    ("vae", [f"--{flag}", value], f"--{flag}")
    for flag in ("z", "iter_max", "iter_save", "batch_size", "run", "runs", "seed", "train", "overwrite", "check_data")
    for value in ("-1", "x", "1.5", "nan", "", "99999999999999999999")
]
BAD += [("vae", [f"--{flag}", "0"], f"--{flag}") for flag in ("z", "iter_max", "iter_save", "batch_size", "runs", "iw")]
BAD += [("vae", ["--beta", value], "--beta") for value in ("-1", "nan", "inf", "x", "", "1e7")]
BAD += [("gmvae", ["--k", value], "--k") for value in ("0", "-5", "x", "2.5", "1000000000")]
BAD += [("ssvae", [f"--{flag}", value], f"--{flag}") for flag in ("gw", "cw") for value in ("-1", "x", "0.5", "nan")]
BAD += [("fsvae", ["--split", value], "--split") for value in ("all", "", "0")]
BAD += [
    ("vae", ["--device", "tpu"], "--device"),
    ("vae", ["--device", ""], "--device"),
    ("vae", ["--device", "cuda:99"], "--device"),
    ("vae", ["--data", "svhn"], "--data"),
    ("fsvae", ["--data", "mnist"], "--data"),
    ("vae", ["--data_dir", ""], "--data_dir"),
    ("vae", ["--data_dir", "a_file"], "a file"),
    ("vae", ["--data_dir", "nowhere/at/all"], "--data_dir"),
    ("vae", ["--data_dir", "/proc/none"], "--data_dir"),
    ("vae", ["--z"], "--z"),
    ("vae", ["--iw"], "--iw"),
    ("vae", ["--iw", "10", "x"], "--iw"),
    ("vae", ["--train", "2"], "--train"),
    ("vae", ["--train", "0", "--overwrite", "1"], "--overwrite"),
    ("ssvae", ["--gw", "0", "--cw", "0"], "--cw"),
    ("vae", ["--k", "5"], "--k"),
    ("vae", ["--gw", "1"], "--gw"),
    ("ssvae", ["--z", "5"], "--z"),
    ("fsvae", ["--beta", "1"], "--beta"),
    ("gmvae", ["--no_such_flag", "1"], "--no_such_flag"),
    ("vae", ["--it", "5"], "--it"),
    ("vae", ["surplus"], "surplus"),
    ("vae", ["--data", "digits", "--train", "0", "--iter_max", "7"], "model-00007.pt"),
]  # fmt: skip


@pytest.mark.parametrize("model, flags, word", BAD, ids=[" ".join([model, *flags]) for model, flags, _ in BAD])
def test_a_bad_command_line_gets_one_line_and_changes_nothing(model, flags, word, tmp_path):
    (tmp_path / "a_file").write_text("not a folder")
    result = subprocess.run([*command(model), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result
    assert len(result.stderr.strip().splitlines()) == 1 and word in result.stderr and not result.stdout
    assert tree(tmp_path) == {"a_file": b"not a folder"} and len(list(tmp_path.iterdir())) == 1


def test_there_are_at_least_eighty_bad_command_lines():
    assert len(BAD) >= 80


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_refused(script, tmp_path):
    for device in ("cuda", "gpu"):
        result = script("vae", "--device", device)
        assert result.returncode == 2 and "--device" in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
