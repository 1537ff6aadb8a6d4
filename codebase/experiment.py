"""What a run of every script does between its command line and its model: device, training or loading, results."""

import contextlib
import json
import os
import sys
import time

import torch

from codebase import checkpoint, cli, data, evaluate, figures, train
from codebase.checkpoint import Refused

OWN_SETTINGS = ("z", "k", "beta", "gw", "cw", "split")


def settle_device(args) -> None:
    """Turn --device into a device that is there, or raise Refused."""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = {"gpu": "cuda"}.get(args.device, args.device)
    if kind == "auto":
        kind = next(kind for kind, there in usable.items() if there)
    if not usable[kind]:
        raise Refused(f"argument --device: torch finds no {kind} on this machine; takes cpu or auto")
    args.device = kind


def join(args) -> None:
    """Join the processes that torchrun started; all but the first fall silent and write nothing."""
    from codebase.parallel import Ranks

    settle_device(args)
    args.ranks = Ranks(args.device)
    if args.ranks.rank:
        checkpoint.writes = False
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


@contextlib.contextmanager
def hold(args):
    """checkpoint.hold by the first process for all."""
    with contextlib.ExitStack() as stack:
        cli.first_rank(args, lambda: stack.enter_context(checkpoint.hold(args.name)))
        yield


def settings(args) -> dict:
    """What fixes the weights of a run, besides the number of steps."""
    own = {key: getattr(args, key) for key in OWN_SETTINGS if hasattr(args, key)}
    return {"model": args.model, **own, "batch_size": args.batch_size, "seed": args.seed, "data": args.data}


def construct(make, args) -> torch.nn.Module:
    """Make the model with weights that the seed fixes, say what will be done, and move it to the device."""
    train.keep_freed_memory()
    torch.manual_seed(args.seed)
    model = make().to(args.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.name}: {size:,} parameters on {args.device} ({torch.get_num_threads()} threads), seed {args.seed}")
    print(f"data: {args.data}; files: {checkpoint.model_path(args.name, 0).parent}/, {checkpoint.log_dir(args.name)}/")
    return model


def train_or_load(model, batch, n: int, args, on_save=lambda step: None) -> None:
    """Bring the model to step args.iter_max: by training or going on, or from the checkpoint that is there already.

    Raises Refused where what is stored contradicts the command line.
    """
    name, steps = model.name, args.iter_max
    if args.overwrite:
        cli.first_rank(args, lambda: checkpoint.discard(name))
    state = checkpoint.load_state(name) if args.train else None
    if state:
        _check_settings(state["settings"], settings(args), name)
        checkpoint.check_weights(checkpoint.state_path(name), state["model"], model)
    stored = checkpoint.stored_steps(name)
    if steps in stored and (not state or state["step"] >= steps):
        checkpoint.load_model_by_name(model, steps)
        print(f"loaded {checkpoint.model_path(name, steps)}" + (", trained before" if args.train else ""))
    elif state and state["step"] > steps:
        raise Refused(
            f"argument --iter_max: {name} was trained to step {state['step']} and has checkpoints at "
            f"{stored}: give one of these, a larger number, {checkpoint.RESTART}"
        )
    elif stored and not state:
        raise Refused(
            f"{name} has checkpoints at {stored} but no state to go on from: "
            f"give one of these as --iter_max, {checkpoint.RESTART}"
        )
    else:
        args.settings = settings(args)
        write_json(
            args,
            "config.json",
            {
                **args.settings,
                "iter_max": steps,
                "device": args.device,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        )
        began = time.monotonic()
        if state:
            print(f"going on from step {state['step']:,}")
        train.fit(model, batch, n, args, state, on_save)
        print(f"trained to step {steps:,} in {duration(time.monotonic() - began)}")


def _check_settings(stored: dict, given: dict, name: str) -> None:
    for key, value in given.items():
        if stored.get(key, value) != value:
            raise Refused(
                f"argument --{key}: {name} was made with {stored[key]}, not {value}: give that, {checkpoint.RESTART}"
            )


def finish(args, results: dict[str, float], pictures: list[str], **extra) -> dict[str, float]:
    """Store the figures in results.json, draw the training curves, print the table of figures and the files."""
    folder = checkpoint.log_dir(args.name)
    if (folder / "metrics.csv").exists():
        pictures = [*pictures, figures.curves(folder)]
    known = read_json(folder / "results.json")
    if known.get("step") == args.iter_max and known.get("data") == described_data(args):
        extra, kept = {**known, **extra}, known["figures"]
    else:
        kept = {}
    content = {"name": args.name, "data": described_data(args), "step": args.iter_max}
    write_json(args, "results.json", {**extra, **content, "figures": {**kept, **results}})
    print("\n" + "\n".join(f"  {key:<12} {value:10.4f}" for key, value in results.items()))
    print(f"\nfiles in {folder}{os.sep}: results.json, {', '.join(pictures)}")
    return results


def described_data(args) -> str:
    """The data set, with what must not be forgotten about it."""
    if args.data == "digits":
        return f"drawn digits, not {args.real.upper()}"
    split = f", {args.split} split" if args.model == "fsvae" else ""
    return args.data + split + ("" if args.check_data else ", files not verified")


def write_json(args, filename: str, content: dict) -> None:
    checkpoint.write(checkpoint.log_dir(args.name) / filename, json.dumps(content, indent=1) + "\n")


def read_json(path) -> dict:
    """The content of a file written earlier, or nothing where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def binary_run(args, make) -> dict[str, float]:
    """A run of the VAE or the GMVAE, which differ in the model alone: train or load, draw, evaluate."""
    model = construct(make, args)
    test = data.load(args, "test")
    x_test = data.test_subset(test)
    images = data.load(args, "train") if args.train else []

    def batch(index):
        return (images.binary(index),), ()

    train_or_load(model, batch, len(images), args)
    folder = checkpoint.log_dir(args.name)
    with evaluate.quietly(model):
        pictures = [
            figures.grid(model.sample_sigmoid(200), 20, folder / "samples.png"),
            figures.reconstructions(x_test, model.reconstruct(x_test), folder / "reconstructions.png"),
        ]
        everything = data.binarize(test.pixels)
    results = evaluate.bounds(model, x_test, () if args.train else tuple(args.iw), ranks=args.ranks)
    results |= evaluate.latent_use(model, everything)
    finish(args, results, pictures)
    print_bounds(results)
    return results


def print_bounds(results: dict[str, float]) -> None:
    """The lines that scripts around the assignment look for."""
    print("NELBO: {nelbo}. KL: {kl}. Rec: {rec}".format(**results))
    for key, value in results.items():
        if key.startswith("niwae_"):
            print(f"Negative IWAE-{key.removeprefix('niwae_')}: {value}")


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
