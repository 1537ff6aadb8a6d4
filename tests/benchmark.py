"""How fast training and evaluation are: against a textbook version, and against their matrix products alone.

python tests/benchmark.py [--quick] prints tables and writes benchmark.json. Blocks of the variants alternate in one
process, so that a machine whose speed drifts treats them alike; what is quoted is the median of the blocks, and the
median of the ratios of blocks that ran one after the other.
"""

# ruff: noqa: E402  (the folder above is put on the path first)
import argparse
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets
from torchvision.transforms import ToTensor
from tqdm import tqdm

from codebase import data, evaluate, train
from codebase.models.fsvae import FSVAE
from codebase.models.gmvae import GMVAE
from codebase.models.ssvae import SSVAE
from codebase.models.vae import VAE
from codebase.runtime.launch import SPIN_COUNT, own_torch_settings
from codebase.runtime.parallel import Processes

VARIANTS = "textbook", "plain", "compiled", "products", "jax"
MODELS = {"vae": VAE, "gmvae": GMVAE, "ssvae": SSVAE, "fsvae": FSVAE}


def training_images(kind, folder):
    """The drawn digits that a model trains on, and 100 labelled ones."""
    images = data.drawn_digits(folder, "train", kind == "fsvae")
    return images, data.labelled_set(images)


def torchvision_data(images):
    """torchvision's own data set, on images that are in memory already."""
    colour = images.pixels.shape[1] == 3072
    found = object.__new__(datasets.SVHN if colour else datasets.MNIST)
    found.data = (
        images.pixels.reshape(-1, 3, 32, 32).numpy()
        if colour
        else images.pixels.reshape(-1, 28, 28)
    )
    found.targets, found.labels = images.labels, images.labels.numpy()
    found.transform, found.target_transform = ToTensor(), None
    return found


def network(a, b, c, activation=nn.ELU):
    return nn.Sequential(
        nn.Linear(a, b), activation(), nn.Linear(b, b), activation(), nn.Linear(b, c)
    )


def log_normal(x, m, v):
    return (-0.5 * math.log(2 * math.pi) - 0.5 * torch.log(v) - (x - m) ** 2 / (2 * v)).sum(-1)


def log_bernoulli(x, logits):
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def kl_normal(m, v):
    return 0.5 * (-torch.log(v) + v + m**2 - 1).sum(-1)


class Textbook(nn.Module):
    """One class with the four bounds as course solutions write them; what is ours comes below it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        x, y, z, hidden = {"ssvae": (784, 10, 64, 300), "fsvae": (3072, 10, 10, 500)}.get(
            kind, (784, 0, 10, 300)
        )
        self.enc, self.dec = network(x + y, hidden, 2 * z), network(z + y, hidden, x)
        if kind == "ssvae":
            self.cls = network(784, 300, 10, nn.ReLU)
        if kind == "gmvae":
            self.z_pre = nn.Parameter(torch.randn(1, 1000, 10) / math.sqrt(5000))

    def encode(self, *inputs):
        m, h = torch.chunk(self.enc(torch.cat(inputs, -1)), 2, -1)
        v = F.softplus(h) + 1e-8
        return m, v, m + torch.sqrt(v) * torch.randn_like(m)

    def log_prior(self, z):
        if self.kind != "gmvae":
            return log_normal(z, torch.zeros(1), torch.ones(1))
        m, h = torch.chunk(self.z_pre, 2, 1)
        m, v = m.expand(len(z), -1, -1), (F.softplus(h) + 1e-8).expand(len(z), -1, -1)
        return torch.logsumexp(log_normal(z.unsqueeze(1).expand_as(m), m, v), 1) - math.log(500)

    def forward(self, x, y=None, labelled=None):
        if self.kind == "ssvae":
            log_q = F.log_softmax(self.cls(x), -1)
            every, tenfold = torch.eye(10).repeat_interleave(len(x), 0), torch.cat([x] * 10)
            m, v, z = self.encode(tenfold, every)
            terms = kl_normal(m, v) - log_bernoulli(tenfold, self.dec(torch.cat([z, every], -1)))
            nelbo = (
                (log_q.exp() * (log_q + math.log(10) + terms.reshape(10, len(x)).t()))
                .sum(-1)
                .mean()
            )
            return nelbo + 100 * F.cross_entropy(self.cls(labelled), torch.arange(100) // 10)
        if self.kind == "fsvae":
            m, v, z = self.encode(x, y)
            out = self.dec(torch.cat([z, y], -1))
            return (kl_normal(m, v) - log_normal(x, out, 0.1 * torch.ones_like(out))).mean()
        m, v, z = self.encode(x)
        kl = log_normal(z, m, v) - self.log_prior(z) if self.kind == "gmvae" else kl_normal(m, v)
        return (kl - log_bernoulli(x, self.dec(z))).mean()

    def iwae(self, x, iw):
        x = x.repeat(iw, 1)
        m, v, z = self.encode(x)
        log_w = log_bernoulli(x, self.dec(z)) + self.log_prior(z) - log_normal(z, m, v)
        return -(torch.logsumexp(log_w.reshape(iw, -1), 0) - math.log(iw)).mean()


def textbook_steps(kind, images, labelled):
    """An endless training loop; next() does a step."""
    model, bar = Textbook(kind), tqdm(file=open(os.devnull, "w"))  # noqa: SIM115
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torchvision_data(images), batch_size=100, shuffle=True)
    grey = labelled.pixels.float() / 255
    while True:
        for x, y in loader:
            optimizer.zero_grad()
            x = x.reshape(100, -1)
            x = x if kind == "fsvae" else torch.bernoulli(x)
            loss = model(
                x, F.one_hot(y, 10).float(), torch.bernoulli(grey) if kind == "ssvae" else None
            )
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.2e}")
            bar.update(1)
            yield


def our_steps(kind, images, labelled, batch_size=100, compiled=False, device="cpu", **options):
    """The loop of train.train, without its files; next() does a step.

    compiled: whether the step is compiled, or on CUDA recorded.
    """
    run = importlib.import_module(f"run_{kind}").parse([]).changed(device=device)
    images = images.to(device)
    labelled = labelled.to(device)
    model = MODELS[kind](**options).to(device)
    optimizer = train.make_optimizer(model, run)
    processes = Processes(device)
    metrics = train.Metrics(run)
    one_hot = labelled.one_hot(torch.arange(100, device=device))

    def batch(index):
        if kind == "fsvae":
            return images.scaled(index), images.one_hot(index)
        if kind == "ssvae":
            return images.binary(index), data.binarize(labelled.pixels), one_hot
        return (images.binary(index),)

    step = train.plain_step(model, optimizer, batch, processes)
    example = torch.zeros(batch_size, dtype=torch.int64, device=device)
    if compiled and device == "cuda":
        step = train.recorded_step(model, optimizer, step, example)
    elif compiled:
        step = train.compiled_step(model, optimizer, batch, example)
    for number, index in enumerate(train.order(len(images), batch_size, 0, 0, device)):
        processes.seed_step(0, number)
        metrics.add(step(index))
        yield


def product_steps(kind):
    """Only the matrix products of the networks in a step, forward and backward, by hooks on their layers."""
    model, products = MODELS[kind](), []

    def record(layer, inputs, output):
        x, g = inputs[0].detach().flatten(0, -2), torch.randn_like(output).flatten(0, -2)
        w = layer.weight.detach()[:, : x.shape[1]]
        products.extend(
            [(x, w.t()), (g[: len(x)].t(), x)] + [(g[: len(x)], w)] * inputs[0].requires_grad
        )

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(record)
    x, y = (
        torch.rand(100, 3072 if kind == "fsvae" else 784).round(),
        F.one_hot(torch.arange(100) % 10, 10).float(),
    )
    model.loss(*{"ssvae": (x, x, y), "fsvae": (x, y)}.get(kind, (x,)))
    while True:
        for a, b in products:
            torch.mm(a, b)
        yield


def alternate(variants, count, blocks):
    """Milliseconds per step of each variant in each block; the blocks of the variants take turns.

    A variant is an endless generator of steps, or a process that does and times as many for every line it reads.
    """
    times = {name: [] for name in variants}
    for _ in range(blocks):
        for name, steps in variants.items():
            if isinstance(steps, subprocess.Popen):
                print(file=steps.stdin, flush=True)
                times[name].append(float(steps.stdout.readline()))
                continue
            for _ in zip(range(3), steps, strict=False):  # a warm-up
                pass
            wait_for_gpu()
            began = time.perf_counter()
            for _ in zip(range(count), steps, strict=False):
                pass
            wait_for_gpu()
            times[name].append(1000 * (time.perf_counter() - began) / count)
    return times


def wait_for_gpu():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(times, above, below):
    """Median of the ratios of blocks that ran one after the other."""
    return median(a / b for a, b in zip(times[above], times[below], strict=True))


RATIOS = ("textbook", "plain"), ("textbook", "compiled"), ("plain", "products"), ("jax", "compiled")


def compare_steps(kind, folder, blocks, peer):
    """Print and return the times of a model's step; peer: a Python that has JAX, or None."""
    images, count = training_images(kind, folder), 20 if kind == "ssvae" else 50
    variants = {"textbook": textbook_steps(kind, *images), "plain": our_steps(kind, *images)}
    variants |= {
        "compiled": our_steps(kind, *images, compiled=True),
        "products": product_steps(kind),
    }
    if peer:
        command = [peer, str(ROOT / "tests" / "peer_jax.py"), kind, str(count)]
        variants["jax"] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    alternate(variants, count, 1)  # compiles
    times = alternate(variants, count, blocks)
    if peer:
        variants["jax"].communicate()
    cells = (
        f"{median(times[name]):.2f}".rjust(10) if name in times else " " * 10 for name in VARIANTS
    )
    ratios = (f"{ratio(times, *pair):.2f}".rjust(19) if pair[0] in times else "" for pair in RATIOS)
    print(f"{kind:<12}{''.join(cells)}{''.join(ratios)}", flush=True)
    return times


def evaluation(kind, whose, folder, ms):
    """Print seconds and megabytes above the start of one evaluation, in this process."""
    ms = tuple(map(int, ms.split(",")))
    x = data.test_subset(data.drawn_digits(folder, "test", False))
    model = MODELS[kind]() if whose == "ours" else Textbook(kind)
    model.enc(x[:2])
    before, began = peak(), time.perf_counter()
    if whose == "ours":
        evaluate.bounds(model, x, ms)
    else:
        for _ in range(100):
            model(x).item()
        for m in ms:
            for _ in range(max(100 // m, 1)):
                model.iwae(x, m).item()
    print(json.dumps({"seconds": time.perf_counter() - began, "megabytes": peak() - before}))


def compare_on_cuda(folder):
    """Print milliseconds per step on a GPU, plain and recorded."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| ms per step | plain | recorded |\n|---|---|---|")
    for kind in MODELS:
        images = training_images(kind, folder)
        variants = {
            "plain": our_steps(kind, *images, device="cuda"),
            "recorded": our_steps(kind, *images, device="cuda", compiled=True),
        }
        times = alternate(variants, 200, 7)
        cells = [f"{median(times[name]):.2f}" for name in variants]
        print(f"| {kind.upper()} | {' | '.join(cells)} |", flush=True)


def serve(kind, folder, count):
    """Do and time as many steps for every line that is read: a variant of alternate."""
    steps = our_steps(kind, *training_images(kind, folder))
    for _ in sys.stdin:
        print(alternate({"ours": steps}, count, 1)["ours"][0], flush=True)


SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "ours": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "libgomp's own": {},
}


def compare_busy(folder, blocks):
    """Print the time of a step, plain, alone and beside a busy process, by OpenMP's settings."""
    print(f"\n{'ms per step':<12}{'beside':>15}" + "".join(f"{name:>15}" for name in SETTINGS))
    clean = {key: value for key, value in os.environ.items() if "OMP_" not in key}
    found = {}
    for kind, count in (("vae", 50), ("ssvae", 10)):
        variants = {}
        for name, settings in SETTINGS.items():
            command = [sys.executable, __file__, "--serve", kind, str(count), "--data_dir", folder]
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            variants[name] = subprocess.Popen(command, env={**clean, **settings}, **streams)
        alternate(variants, count, 1)
        for beside in ("nothing", "a busy process"):
            busy = None
            if beside != "nothing":
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            times = alternate(variants, count, blocks)
            if busy:
                busy.kill()
            medians = "".join(f"{median(times[name]):15.1f}" for name in SETTINGS)
            idle = ratio(times, "ours", "libgomp's own")
            speed = ratio(times, "one thread", "ours")
            said = f"ours takes {idle:.2f} of libgomp's time, has {speed:.2f} of one thread's speed"
            print(f"{kind:<12}{beside:>15}{medians}   {said}", flush=True)
            found[f"{kind}, beside {beside}"] = times
        for process in variants.values():
            process.communicate()
    return found


def linux_says(file, key, otherwise):
    """A value in a file of /proc."""
    lines = Path("/proc", file).read_text().splitlines() if Path("/proc", file).exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), otherwise)


def peak():
    """Megabytes that this process has had at once; getrusage would count the process that started it too."""
    return float(linux_says("self/status", "VmHWM", "nan kB").split()[0]) / 1024


def in_process(*words):
    """What CHILDREN[words[0]](*words[1:]) prints in a process of its own."""
    command = [sys.executable, __file__, "--child", *map(str, words)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare_evaluation(kind, folder, rounds):
    """Print and return seconds and megabytes of an evaluation."""
    runs = {"textbook": [], "ours": []}
    for _ in range(rounds):
        for whose, found in runs.items():
            found.append(in_process("evaluation", kind, whose, folder, "1,10,100,1000"))
    seconds, megabytes = (
        {whose: [run[key] for run in found] for whose, found in runs.items()}
        for key in ("seconds", "megabytes")
    )
    cells = (
        *map(median, seconds.values()),
        ratio(seconds, *seconds),
        *map(median, megabytes.values()),
    )
    print("{:<12}{:20.2f}{:8.2f}{:8.1f}{:20.0f}{:8.0f}".format(kind, *cells), flush=True)
    return runs


def start_up(folder):
    """Seconds from a command to its line that the first step is done: plain, compiled, again; and of --help."""
    words, found = ["--data", "digits", "--data_dir", folder, "--iter_max", "1"], {}
    commands = {"plain": words, "compiled": [*words, "--compile", "1", "--run", "1"]}
    commands |= {"compiled again": [*words, "--compile", "1", "--run", "2"], "--help": ["--help"]}
    with tempfile.TemporaryDirectory() as place:
        for name, flags in commands.items():
            command, began = (
                [sys.executable, "-u", str(ROOT / "run_vae.py"), *flags],
                time.perf_counter(),
            )
            known = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(place, "compiled"))}
            with subprocess.Popen(
                command, cwd=place, env=known, stdout=subprocess.PIPE, text=True
            ) as process:
                lines = (said for said in process.stdout if said.startswith(("trained", "usage")))
                (found[name],) = (time.perf_counter() - began for _ in lines)
    return found


def step_cost(kind, folder, batch_size, k):
    """Print milliseconds per step and megabytes above the start, in this process."""
    options = {"k": int(k)} if kind == "gmvae" else {}
    steps = our_steps(kind, *training_images(kind, folder), int(batch_size), **options)
    before = peak()
    count = max(5, 5000 // int(batch_size))
    times = alternate({"ours": steps}, count, 3)["ours"]
    print(json.dumps({"ms": median(times), "megabytes": peak() - before}))


def of_processes(count, batch_size, folder):
    """Milliseconds per step of run_vae.py on so many processes, which torchrun starts."""
    script = [str(ROOT / "run_vae.py"), "--data", "digits", "--data_dir", folder]
    script += ["--iter_max", "300", "--iter_save", "300", "--compile", "0", "--device", "cpu"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "--"]
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, *launcher, *script, "--batch_size", str(batch_size)]
        subprocess.run(words, cwd=place, capture_output=True, check=True)
        (metrics,) = Path(place, "logs").glob("*/metrics.csv")
        seconds = [float(row.split(",")[-1]) for row in metrics.read_text().splitlines()[1:]]
    return 1000 * (seconds[2] - seconds[0]) / 200


def growth_of_batch(folder):
    print("| batch | " + " | ".join(f"{kind.upper()}, ms | MB" for kind in MODELS) + " |")
    print("|---|" + "---|---|" * len(MODELS))
    for size in (100, 1000, 10_000):
        found = [in_process("step", kind, folder, size, 500) for kind in MODELS]
        cells = [f"{cost['ms']:.1f} | {cost['megabytes']:.0f}" for cost in found]
        print(f"| {size:,} | " + " | ".join(cells) + " |", flush=True)


def growth_of_k(folder):
    print("| k | GMVAE, ms | MB |\n|---|---|---|")
    for k in (10, 100, 1000, 10_000):
        cost = in_process("step", "gmvae", folder, 100, k)
        print(f"| {k:,} | {cost['ms']:.1f} | {cost['megabytes']:.0f} |", flush=True)


def growth_of_m(folder):
    print("| m | VAE, s | MB | GMVAE, s | MB |\n|---|---|---|---|---|")
    for m in (1, 100, 1000, 10_000):
        found = [in_process("evaluation", kind, "ours", folder, m) for kind in ("vae", "gmvae")]
        cells = [f"{cost['seconds']:.1f} | {cost['megabytes']:.0f}" for cost in found]
        print(f"| {m:,} | " + " | ".join(cells) + " |", flush=True)


def growth_of_processes(folder):
    print("| batch | 1 process, ms | 2 processes, ms |\n|---|---|---|")
    for size in (100, 1000):
        cells = [f"{of_processes(count, size, folder):.1f}" for count in (1, 2)]
        print(f"| {size:,} | " + " | ".join(cells) + " |", flush=True)


CHILDREN = {"evaluation": evaluation, "step": step_cost}
GROWTH = {
    "batch": growth_of_batch,
    "k": growth_of_k,
    "m": growth_of_m,
    "processes": growth_of_processes,
}


def profile(kind, folder):
    """Print what the time of our step goes to, by torch's profiler."""
    steps = our_steps(kind, *training_images(kind, folder))
    alternate({"warm up": steps}, 5, 1)
    with torch.profiler.profile() as found:
        alternate({"ours": steps}, 20, 1)
    print(
        found.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish in three minutes")
    parser.add_argument(
        "--profile", choices=MODELS, help="only print what the time of this model's step goes to"
    )
    parser.add_argument(
        "--peer", choices=["jax"], help="measure this library's version of the models beside ours"
    )
    parser.add_argument(
        "--peer_python", default=sys.executable, help="the Python in which it is installed"
    )
    parser.add_argument("--data_dir", default="data", help="where the drawn digits are stored")
    parser.add_argument("--output", default="benchmark.json")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="only print what a busy process beside it does to a step",
    )
    text = "only print the time of a step on a GPU"
    parser.add_argument("--cuda", action="store_true", help=text)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    text = "only print how time and memory grow with this"
    parser.add_argument("--growth", choices=GROWTH, help=text)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = str(Path(args.data_dir).resolve())
    with own_torch_settings("cpu"):  # as the scripts compute; the textbook version gains by it too
        measure(args, folder)


def measure(args, folder):
    if args.child:
        name, *words = args.child
        return CHILDREN[name](*words)
    if args.growth:
        for kind in MODELS:  # drawn here, so that no measured process has to
            training_images(kind, folder)
        return GROWTH[args.growth](folder)
    if args.serve:
        kind, count = args.serve
        return serve(kind, folder, int(count))
    if args.cuda:
        return compare_on_cuda(folder)
    if args.busy:
        return compare_busy(folder, 5 if args.quick else 9)
    if args.profile:
        return profile(args.profile, folder)

    found = {"cpu": linux_says("cpuinfo", "model name", platform.processor() or platform.machine())}
    found |= {"capability": torch.backends.cpu.get_cpu_capability()}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print("{cpu}, {capability}, {threads} threads, torch {torch}\n".format(**found))
    names = "".join(name.rjust(10) for name in VARIANTS) + "".join(
        "/".join(pair).rjust(19) for pair in RATIOS
    )
    print(f"{'ms per step':<12}{names}")
    peer = args.peer_python if args.peer else None
    found["steps"] = {
        kind: compare_steps(kind, folder, 5 if args.quick else 9, peer) for kind in MODELS
    }
    print(
        f"\n{'evaluation':<12}{'seconds: textbook':>20}{'ours':>8}{'ratio':>8}{'MB: textbook':>20}{'ours':>8}"
    )
    found["evaluation"] = {
        kind: compare_evaluation(kind, folder, 1 if args.quick else 5) for kind in ("vae", "gmvae")
    }
    found["start_up"] = start_up(folder)
    values = ", ".join(f"{name}: {seconds:.2f}" for name, seconds in found["start_up"].items())
    print(f"start-up, seconds: {values}")
    Path(args.output).write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nall figures are in {args.output}")


if __name__ == "__main__":
    main()
