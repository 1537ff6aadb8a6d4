"""How fast training and evaluation are: against a textbook version, and against their matrix products alone.

python tests/benchmark.py [--quick] prints tables and writes benchmark.json. Blocks of the variants alternate in one
process, so that a machine whose speed drifts treats them alike; what is quoted is the median of the blocks.
"""

# ruff: noqa: E402  (the folder above is put on the path first)
import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import ToTensor
from tqdm import tqdm

from codebase import cli, data, digits, evaluate, train
from codebase.models import nns
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE

# ---------------------------------------------------------------- the textbook version


class Grey(torchvision.datasets.MNIST):
    """torchvision's own data set, on images that are in memory already."""

    def __init__(self, images):
        self.data, self.targets = images.pixels.reshape(-1, 28, 28), images.labels
        self.transform, self.target_transform = ToTensor(), None


class Colour(torchvision.datasets.SVHN):
    def __init__(self, images):
        self.data, self.labels = images.pixels.reshape(-1, 3, 32, 32).numpy(), images.labels.numpy()
        self.transform, self.target_transform = ToTensor(), None


def network(a, b, c, activation=nn.ELU):
    return nn.Sequential(nn.Linear(a, b), activation(), nn.Linear(b, b), activation(), nn.Linear(b, c))


def textbook_log_normal(x, m, v):
    return (-0.5 * math.log(2 * math.pi) - 0.5 * torch.log(v) - (x - m) ** 2 / (2 * v)).sum(-1)


def textbook_log_bernoulli(x, logits):
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def textbook_kl(m, v):
    return 0.5 * (-torch.log(v) + v + m**2 - 1).sum(-1)


class Textbook(nn.Module):
    """One class with the four bounds as course solutions write them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        x, y, z, hidden = {"ssvae": (784, 10, 64, 300), "fsvae": (3072, 10, 10, 500)}.get(kind, (784, 0, 10, 300))
        self.enc, self.dec = network(x + y, hidden, 2 * z), network(z + y, hidden, x)
        if kind == "ssvae":
            self.cls = network(784, 300, 10, nn.ReLU)
        if kind == "gmvae":
            self.z_pre = nn.Parameter(torch.randn(1, 1000, 10) / math.sqrt(5000))

    def encode(self, *inputs):
        m, h = torch.chunk(self.enc(torch.cat(inputs, -1)), 2, -1)
        return m, F.softplus(h) + 1e-8

    def log_mixture(self, z):
        m, h = torch.chunk(self.z_pre, 2, 1)
        m, v = m.expand(len(z), -1, -1), (F.softplus(h) + 1e-8).expand(len(z), -1, -1)
        return torch.logsumexp(textbook_log_normal(z.unsqueeze(1).expand_as(m), m, v), 1) - math.log(500)

    def forward(self, x, y=None, labelled=None):
        if self.kind == "ssvae":
            log_q = F.log_softmax(self.cls(x), -1)
            every = torch.eye(10).repeat_interleave(len(x), 0)
            tenfold = torch.cat([x] * 10)
            m, v = self.encode(tenfold, every)
            z = m + torch.sqrt(v) * torch.randn_like(m)
            rec = -textbook_log_bernoulli(tenfold, self.dec(torch.cat([z, every], -1)))
            terms = (textbook_kl(m, v) + rec).reshape(10, len(x)).t()
            nelbo = (log_q.exp() * (log_q + math.log(10) + terms)).sum(-1).mean()
            return nelbo + 100 * F.cross_entropy(self.cls(labelled), torch.arange(100) // 10)
        inputs = (x, y) if self.kind == "fsvae" else (x,)
        m, v = self.encode(*inputs)
        z = m + torch.sqrt(v) * torch.randn_like(m)
        out = self.dec(torch.cat([z, *inputs[1:]], -1))
        if self.kind == "fsvae":
            return (textbook_kl(m, v) - textbook_log_normal(x, out, 0.1 * torch.ones_like(out))).mean()
        kl = textbook_log_normal(z, m, v) - self.log_mixture(z) if self.kind == "gmvae" else textbook_kl(m, v)
        return (kl - textbook_log_bernoulli(x, out)).mean()

    def iwae(self, x, iw):
        m, v = self.encode(x.repeat(iw, 1))
        z = m + torch.sqrt(v) * torch.randn_like(m)
        log_p_z = self.log_mixture(z) if self.kind == "gmvae" else textbook_log_normal(z, torch.zeros(1), torch.ones(1))
        log_w = textbook_log_bernoulli(x.repeat(iw, 1), self.dec(z)) + log_p_z - textbook_log_normal(z, m, v)
        return -(torch.logsumexp(log_w.reshape(iw, -1), 0) - math.log(iw)).mean()


def textbook_steps(kind, images, labelled):
    """An endless training loop; next() does a step."""
    model, bar = Textbook(kind), tqdm(file=open(os.devnull, "w"))  # noqa: SIM115
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader((Colour if kind == "fsvae" else Grey)(images), batch_size=100, shuffle=True)
    grey = labelled.pixels.float() / 255
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            x = x.reshape(100, -1)
            x = x if kind == "fsvae" else torch.bernoulli(x)
            loss = model(x, F.one_hot(y, 10).float(), torch.bernoulli(grey) if kind == "ssvae" else None)
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.2e}")
            bar.update(1)
            yield


# ---------------------------------------------------------------- ours and the limit

MODELS = {"vae": VAE, "gmvae": GMVAE, "ssvae": SSVAE, "fsvae": FSVAE}


def our_step(kind, images, labelled, batch_size=100, **options):
    """The Step that the scripts run, and its batches."""
    model, y = MODELS[kind](**options), labelled.one_hot(torch.arange(100))

    def batch(index):
        if kind == "fsvae":
            return (images.scaled(index), images.one_hot(index)), ()
        return (images.binary(index),), (data.binarize(labelled.pixels), y) if kind == "ssvae" else ()

    terms = torch.zeros(7 if kind == "ssvae" else 4)
    step = train.Step(model, batch, train.adam(model, "cpu"), terms)
    return step, train.order(len(images), batch_size, 0, 0, "cpu")


def our_steps(*args, **options):
    step, batches = our_step(*args, **options)
    while True:
        step(next(batches))
        yield


def limit_steps(kind, images, labelled, product):
    """Only the matrix products of our step's networks, forward and backward: product(a, b) is a b^T."""
    work, ours = [], nns.product

    def recorded(a, b, bias=None):
        work.append((torch.randn_like(a), torch.randn_like(b)))  # laid out alike
        return ours(a, b, bias)

    nns.product = recorded
    step, batches = our_step(kind, images, labelled)
    step(next(batches))
    nns.product = ours
    while True:
        for a, b in work:
            product(a, b)
        yield


def timed(steps, count, warm_up=0):
    for _ in range(warm_up):
        next(steps)
    began = time.perf_counter()
    for _ in range(count):
        next(steps)
    return 1000 * (time.perf_counter() - began) / count


def compare_steps(kind, folder, blocks):
    images = digits.load(folder, "train", "colour" if kind == "fsvae" else "grey")
    labelled = data.labelled_set(images)
    variants = {
        "textbook": textbook_steps(kind, images, labelled),
        "ours": our_steps(kind, images, labelled),
        "limit": limit_steps(kind, images, labelled, lambda a, b: a @ b.T),
    }
    if nns._onednn is not None:
        variants["limit_onednn"] = limit_steps(kind, images, labelled, nns.product)
    return alternate(variants, 20 if kind == "ssvae" else 50, blocks)


def alternate(variants, count, blocks):
    """Milliseconds per step of each variant in each block; the blocks of the variants take turns."""
    times = {name: [] for name in variants}
    for _ in range(blocks):
        for name, steps in variants.items():
            if name == "textbook":  # as many page faults as where glibc adapts itself, in a process of its own
                train.keep_freed_memory(4 << 20, 8 << 20)
            else:
                train.keep_freed_memory()
            times[name].append(timed(steps, count, warm_up=3))
    return times


def compare_compiled(kind, folder, blocks=9):
    """Print what torch.compile around the loss makes of our step, and of a default run with its start-up."""
    images = digits.load(folder, "train", "colour" if kind == "fsvae" else "grey")
    labelled, ours = data.labelled_set(images), nns.product

    @torch.library.custom_op(f"benchmark::{kind}", mutates_args=())  # oneDNN's product is not open to the compiler
    def opaque(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return ours(a, b, bias)

    opaque.register_fake(lambda a, b, bias: a.new_empty(len(a), len(b)))

    def compiled():
        step, batches = our_step(kind, images, labelled)
        step.model.loss = torch.compile(step.model.loss)
        while True:
            nns.product = lambda a, b, bias=None: opaque(a, b, bias)
            step(next(batches))
            nns.product = ours
            yield

    variants = {"ours": our_steps(kind, images, labelled), "compiled": compiled()}
    start_up = timed(variants["compiled"], 1) / 1000
    times = alternate(variants, 20 if kind == "ssvae" else 50, blocks)
    plain, fused = (statistics.median(times[name]) / 1000 for name in ("ours", "compiled"))
    steps = cli.ITER_MAX.get(kind, cli.FLAGS["iter_max"][0])
    gain = statistics.median(a / b for a, b in zip(times["ours"], times["compiled"], strict=True))
    print(f"{kind}: {1000 * plain:.2f} ms per step, compiled {1000 * fused:.2f} (ratio {gain:.2f}), ", end="")
    print(f"start-up {start_up:.0f} s; {steps:,} steps {steps * plain:,.0f} and {start_up + steps * fused:,.0f} s")


# ---------------------------------------------------------------- evaluation, start-up, growth


def evaluation(kind, whose, folder, ms):
    """Seconds and megabytes above the start of one evaluation, in this process."""
    x = data.test_subset(digits.load(folder, "test", "grey"))
    torch.manual_seed(0)
    model = MODELS[kind]() if whose == "ours" else Textbook(kind)
    model.enc(x[:2])
    start, began = peak_megabytes(), time.perf_counter()
    if whose == "ours":
        train.keep_freed_memory()
        evaluate.bounds(model, x, ms)
    else:
        for _ in range(100):
            model(x).item()
        for m in ms:
            for _ in range(max(100 // m, 1)):
                model.iwae(x, m).item()
    return {"seconds": time.perf_counter() - began, "megabytes": peak_megabytes() - start}


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_process(*words):
    """This file's answer in a process of its own."""
    output = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, words)], capture_output=True, text=True, check=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def start_up(folder):
    """Seconds from the command to the line that its first step is done, and for --help."""
    script = str(ROOT / "run_vae.py")
    with tempfile.TemporaryDirectory() as place:
        words = ["--data", "digits", "--data_dir", folder, "--iter_max", "1"]
        began = time.perf_counter()
        command = [sys.executable, "-u", script, *words]
        with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True) as process:
            seen = [(time.perf_counter() - began, line) for line in process.stdout]
        first = next(seconds for seconds, line in seen if line.startswith("trained"))
        began = time.perf_counter()
        subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True)
        return {"first step": first, "--help": time.perf_counter() - began}


def growth(folder, quick):
    """How cost grows with the batch, the components and the importance samples."""
    grey = digits.load(folder, "train", "grey")
    colour, labelled, out = digits.load(folder, "train", "colour"), data.labelled_set(grey), {}

    def medians(variants):
        return {size: statistics.median(times) for size, times in alternate(variants, 5, 1 if quick else 3).items()}

    sizes = (100, 1000) if quick else (100, 1000, 10_000)
    for kind in MODELS:
        images = colour if kind == "fsvae" else grey
        variants = {size: our_steps(kind, images, labelled, size) for size in sizes}
        out[f"{kind} ms per step, batch"] = medians(variants)
    counts = (10, 1000) if quick else (10, 100, 1000, 10_000)
    out["gmvae ms per step, k"] = medians({k: our_steps("gmvae", grey, labelled, k=k) for k in counts})
    found = {m: in_process("vae", "ours", folder, m) for m in ((1, 1000) if quick else (1, 100, 1000, 10_000, 100_000))}
    out["vae evaluation seconds, m"] = {m: result["seconds"] for m, result in found.items()}
    out["vae evaluation MB above the start, m"] = {m: result["megabytes"] for m, result in found.items()}
    return out


def profile(kind, folder):
    """What the time of our step goes to, by torch's profiler."""
    images = digits.load(folder, "train", "colour" if kind == "fsvae" else "grey")
    steps = our_steps(kind, images, data.labelled_set(images))
    timed(steps, 5)
    with torch.profiler.profile() as found:
        timed(steps, 20)
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish in two minutes")
    parser.add_argument("--profile", choices=MODELS, help="only print what the time of this model's step goes to")
    parser.add_argument("--compile", action="store_true", help="only measure what torch.compile would win")
    parser.add_argument("--data_dir", default="data", help="where the drawn digits are stored")
    parser.add_argument("--output", default="benchmark.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, whose, folder, ms = args.child
        print(json.dumps(evaluation(kind, whose, folder, tuple(map(int, ms.split(","))))))
        return
    train.keep_freed_memory()
    folder = str(Path(args.data_dir).resolve())
    if args.profile:
        print(profile(args.profile, folder))
        return
    if args.compile:
        for kind in MODELS:
            compare_compiled(kind, folder)
        return
    found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "steps": {}, "evaluation": {}}
    print(
        f"{'ms per step':<12}{'textbook':>18}{'ours':>18}{'limit':>18}{'oneDNN limit':>18}   textbook/ours  ours/limit"
    )
    for kind in MODELS:
        times = compare_steps(kind, folder, 5 if args.quick else 9)
        found["steps"][kind] = times
        middle = {name: statistics.median(values) for name, values in times.items()}
        cells = "".join(
            f"{middle[name]:9.2f} ({min(values):.2f}-{max(values):.2f})".rjust(18) for name, values in times.items()
        )
        ratios = [statistics.median(a / b for a, b in zip(times[x], times[y], strict=True))
                  for x, y in (("textbook", "ours"), ("ours", "limit"))]  # fmt: skip
        print(f"{kind:<12}{cells}   {ratios[0]:13.2f}  {ratios[1]:10.2f}", flush=True)
    print("\nevaluation        seconds: textbook, ours      MB above the start: textbook, ours")
    for kind in ("vae",) if args.quick else ("vae", "gmvae"):
        rounds = 1 if args.quick else 3
        pairs = [
            [in_process(kind, whose, folder, "1,10,100,1000") for whose in ("textbook", "ours")] for _ in range(rounds)
        ]
        found["evaluation"][kind] = pairs
        seconds, megabytes = (
            [statistics.median(pair[i][key] for pair in pairs) for i in (0, 1)] for key in ("seconds", "megabytes")
        )
        print(f"{kind:<12}{seconds[0]:19.2f}{seconds[1]:8.2f} ({seconds[0] / seconds[1]:.1f} x)"
              f"{megabytes[0]:22.0f}{megabytes[1]:8.0f}", flush=True)  # fmt: skip
    found["start_up"] = start_up(folder)
    print("\nstart-up, seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in found["start_up"].items()))
    found["growth"] = growth(folder, args.quick)
    for name, values in found["growth"].items():
        print(f"{name}: " + ", ".join(f"{size}: {value:.1f}" for size, value in values.items()))
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nall figures are in {args.output}")


if __name__ == "__main__":
    main()
