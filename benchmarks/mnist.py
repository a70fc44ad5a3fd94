"""Step times of the MNIST trainers relative to baselines, interleaved in one process on the same threads.

    python benchmarks/mnist.py                    # step times; writes benchmarks/results/mnist.{json,md}
    python benchmarks/mnist.py --mnist_dir=DIR    # also the time to 98.5% on the full MNIST (idx files)

The models are 784-128-128-10 with batch 64 (small) and 784-512-512-10 with batch 128 (large), with ReLU and
Adam. The baselines are `keras.Model.fit`, the same with its best `steps_per_execution`, and a hand-written
loop (JAX: `lax.scan` over the whole round; PyTorch: `torch.nn.Module`, `torch.optim.Adam(fused=True)`). Ours
is the trainer with everything it does for the user: accuracy, running means, `metrics.jsonl` every 50 steps.
Each round runs everything once. A ratio is the median over the rounds of the ratio within a round.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from machine import machine, open_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"small": (128, 64), "large": (512, 128)}
SAMPLES = 60_000
OPEN_RUNS = contextlib.ExitStack()
SHOWN = {"jax", "keras", "lightning", "numpy", "torch"}
TO_985 = [
    'mnist.Data.source = "idx"',
    'mnist.Data.validation = "test"',
    "mnist.Model.hidden = (256, 256)",
    "mnist.Model.dropout = 0.0",
    "mnist.Train.epochs = 10",
    "mnist.Train.stop_at = 0.985",
    'Log.progress = "bar"',
]


def main() -> int:
    """Runs the benchmark, each backend in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed rounds; at least 5 for published results"
    )
    parser.add_argument("--steps", type=int, default=512, help="approximate steps per round")
    parser.add_argument("--threads", type=int, default=1, help="cores that the process may use")
    parser.add_argument("--mnist_dir", help="directory of the full MNIST's idx files")
    parser.add_argument("--repeats", type=int, default=3, help="runs to 98.5%% per backend")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where mnist.json and mnist.md go")
    parser.add_argument("--child", choices=["jax", "torch"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with OPEN_RUNS:
            json.dump(child(arguments.child, arguments), sys.stdout)
        return 0
    results = {"header": header(arguments), "steps": {}, "ratios": {}}
    for backend in ("jax", "torch"):
        print(f"{backend}: {arguments.rounds} rounds of {arguments.steps} steps ...", file=sys.stderr)
        results["steps"][backend] = run_child(backend, arguments)
    results["ratios"] = ratios(results["steps"])
    if arguments.mnist_dir:
        results["to_985"] = to_985(arguments)
        results["ratios"] |= {
            f"seconds_to_985_{name}": run["seconds"] for name, run in results["to_985"].items()
        }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "mnist.json").write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    (arguments.output / "mnist.md").write_text(text)
    print(text)
    return 0


def header(arguments: argparse.Namespace) -> dict:
    """Hardware, versions and settings."""
    return machine() | {"threads": arguments.threads, "rounds": arguments.rounds, "steps": arguments.steps}


def run_child(backend: str, arguments: argparse.Namespace) -> dict:
    """The step times of one backend, measured in its own process on `threads` cores."""
    environment = dict(os.environ, KERAS_BACKEND=backend, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"BLACKSMITH_CACHE": cache, "KERAS_HOME": cache, "KERAS_TORCH_DEVICE": "cpu"}
        command = [sys.executable, __file__, f"--child={backend}"]
        command += [f"--{name}={getattr(arguments, name)}" for name in ("rounds", "steps", "threads")]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def child(backend: str, arguments: argparse.Namespace) -> dict:
    """Times every peer of one backend in both sizes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[-arguments.threads :])
    if backend == "torch":
        import torch

        torch.set_num_threads(arguments.threads)
    import numpy as np

    rng = np.random.default_rng(0)
    inputs = rng.random((SAMPLES, 28, 28), np.float32)
    labels = rng.integers(0, 10, SAMPLES).astype(np.int32)
    measured = {}
    for size, (width, batch) in SIZES.items():
        peers = make_peers(backend, width, batch, inputs, labels, arguments.steps)
        for run in peers.values():  # compiles and warms up
            run()
        times = {name: [] for name in peers}
        for _ in range(arguments.rounds):
            for name, run in peers.items():
                start = time.perf_counter()
                taken = run()
                times[name].append((time.perf_counter() - start) / taken * 1e6)
        measured[size] = times
    return measured


def make_peers(backend, width, batch, inputs, labels, steps):
    """By name, functions that take about `steps` steps and return how many they took."""
    peers = {"ours": ours(width, batch, inputs, labels, steps)}
    count = steps * batch
    x = inputs[np_rows(count, len(inputs))]
    y = labels[np_rows(count, len(labels))]
    # Keras on PyTorch supports only steps_per_execution=1.
    for executions in (1, 10, 50) if backend == "jax" else (1,):
        name = "fit" if executions == 1 else f"fit_{executions}"
        peers[name] = fit(width, batch, x, y, executions)
    if backend == "jax":
        peers["native"] = native_jax(width, batch, inputs, labels, steps)
    else:
        peers["native"] = native_torch(width, batch, inputs, labels, steps)
        peers["lightning"] = lightning(width, batch, inputs, labels, steps)
    return peers


def np_rows(count, size):
    """`count` row numbers that cycle through `size` rows."""
    import numpy as np

    return np.arange(count) % size


def make_trainer(width, batch, inputs, labels):
    """Our trainer with a run directory."""
    from blacksmith.models.keras.mnist.mlp import mlp
    from blacksmith.trainers.classification import make_setup
    from blacksmith.trainers.keras_trainer import KerasTrainer, Samples

    params = [
        'Run.experiment = "keras/mnist"',
        f'Run.backend = "{os.environ["KERAS_BACKEND"]}"',
        f"mnist.Train.batch_size = {batch}",
        "mnist.Train.steps = 100000000",
        "Checkpoint.every_epochs = None",
        "Log.tensorboard = False",
        'Log.progress = "off"',
    ]
    directory = OPEN_RUNS.enter_context(tempfile.TemporaryDirectory())
    run = open_run([], params, directory)
    OPEN_RUNS.enter_context(run.opened())
    none = Samples(inputs[:0], labels[:0])
    splits = Samples(inputs, labels), none, none
    return KerasTrainer(run, make_setup(run.config, lambda: mlp((width, width), activation="relu"), splits))


def ours(width, batch, inputs, labels, steps):
    """The body of `KerasTrainer.fit`."""
    trainer = make_trainer(width, batch, inputs, labels)
    blocks = trainer.loop.blocks(trainer.run.config.train.block_steps)

    def run():
        start = trainer.loop.step
        while trainer.loop.step < start + steps:
            step, count = next(blocks)
            block = trainer.setup.order.block(step, count)
            trainer.log(block, trainer.backend.train_block(block, step))
        return trainer.loop.step - start

    return run


def lightning(width, batch, inputs, labels, steps):
    """The Lightning experiment's module under Lightning's Trainer, in the middle of an epoch."""
    import logging
    import warnings

    import lightning as L

    from blacksmith.experiments.lightning.mnist.train import Batches, MnistModule

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    ours = make_trainer(width, batch, inputs, labels)
    batches = Batches(ours)
    module = MnistModule(ours, batches)

    def run():
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        start, between = ours.loop.step, ours.loop.between
        ours.loop.between = lambda: between() and ours.loop.step < start + steps
        trainer.fit(module, batches)
        ours.loop.between = between
        return ours.loop.step - start

    return run


def fit(width, batch, x, y, executions):
    """One epoch of `keras.Model.fit` over exactly the round's samples."""
    import keras

    from blacksmith.models.keras.mnist.mlp import mlp

    model = mlp((width, width), activation="relu")
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=executions,
    )

    def run():
        model.fit(x, y, batch_size=batch, epochs=1, verbose=0)
        return len(x) // batch

    return run


def native_jax(width, batch, inputs, labels, steps):
    """A hand-written JAX loop: one `lax.scan` over the round, Adam by hand; loss only."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(1)
    shapes = [(784, width), (width,), (width, width), (width,), (width, 10), (10,)]
    parameters = [jnp.asarray(rng.normal(0, 0.05, s) * (len(s) == 2), jnp.float32) for s in shapes]
    state = [(parameters, [p * 0 for p in parameters], [p * 0 for p in parameters], jnp.float32(0))]
    x, y = jnp.asarray(inputs.reshape(-1, 784)), jnp.asarray(labels)

    def loss(p, xb, yb):
        h = jax.nn.relu(xb @ p[0] + p[1])
        h = jax.nn.relu(h @ p[2] + p[3])
        logits = jax.nn.log_softmax(h @ p[4] + p[5])
        return -jnp.mean(jnp.take_along_axis(logits, yb[:, None], 1))

    def step(carry, rows, x, y):
        p, m, v, t = carry
        value, g = jax.value_and_grad(loss)(p, x[rows], y[rows])
        t = t + 1
        alpha = 1e-3 * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        m = [a + (b - a) * 0.1 for a, b in zip(m, g)]
        v = [a + (b * b - a) * 0.001 for a, b in zip(v, g)]
        p = [a - alpha * b / (jnp.sqrt(c) + 1e-7) for a, b, c in zip(p, m, v)]
        return (p, m, v, t), value

    @partial(jax.jit, donate_argnums=0)
    def epoch(carry, rows, x, y):
        return jax.lax.scan(lambda c, r: step(c, r, x, y), carry, rows)

    order = np.random.default_rng(2)

    def run():
        rows = order.permutation(len(inputs))[: steps * batch]
        rows = np.resize(rows, (steps, batch)).astype(np.int32)
        state[0], losses = epoch(state[0], rows, x, y)
        np.asarray(losses)
        return steps

    return run


def native_torch(width, batch, inputs, labels, steps):
    """A hand-written PyTorch loop: `torch.nn.Module`, fused Adam, data on the device; loss only."""
    import numpy as np
    import torch
    from torch import nn

    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64))
    order = np.random.default_rng(2)

    def run():
        rows = np.resize(order.permutation(len(inputs))[: steps * batch], (steps, batch))
        losses = []
        for row in torch.from_numpy(rows):
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(x[row]), y[row])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.stack(losses).numpy()
        return steps

    return run


def ratios(measured: dict) -> dict[str, float]:
    """The named ratios: ours over theirs, the median over rounds; `fit` with its best setting."""

    def ratio(backend: str, size: str, ours: str, theirs: str) -> float:
        times = measured[backend][size]
        return round(median([a / b for a, b in zip(times[ours], times[theirs])]), 3)

    found = {}
    for size in SIZES:
        found[f"jax_{size}_vs_scan"] = ratio("jax", size, "ours", "native")
        found[f"torch_{size}_vs_native"] = ratio("torch", size, "ours", "native")
        for backend in ("jax", "torch"):
            times = measured[backend][size]
            best = min((n for n in times if n.startswith("fit")), key=lambda n: median(times[n]))
            found[f"{backend}_{size}_vs_fit"] = ratio(backend, size, "ours", best)
        found[f"lightning_{size}_vs_torch"] = ratio("torch", size, "lightning", "ours")
    return found


def to_985(arguments: argparse.Namespace) -> dict:
    """Wall seconds of the whole process, from start to exit, of a run that stops at 98.5% test accuracy.

    It trains on all 60,000 images and validates on the test set, through the launcher, with metrics,
    TensorBoard, progress bar, a checkpoint per epoch, the final test and the report, on all cores.
    """
    found = {}
    for name in ("jax", "torch", "lightning"):
        runs = []
        for seed in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as directory:
                workdir = Path(directory) / "run"
                command = [sys.executable, "-m", "blacksmith.launch", f"--gin_file=gin/mnist_{name}.gin"]
                params = [*TO_985, f"mnist.Data.path = {arguments.mnist_dir!r}", f"Run.seed = {seed}"]
                command += [f"--gin_param={p}" for p in params]
                command += [f"--workdir={workdir}", "--device=cpu"]
                start = time.perf_counter()
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.perf_counter() - start
                if status:
                    raise SystemExit(f"{name}: exit status {os.waitstatus_to_exitcode(status)}")
                result = json.loads((workdir / "result.json").read_text())
            scale = 1 if sys.platform == "darwin" else 1024
            runs.append(
                {
                    "seed": seed,
                    "seconds": round(seconds, 2),
                    "epoch": result["epoch"],
                    "accuracy": result["test"]["accuracy"],
                    "peak_memory_mib": round(usage.ru_maxrss * scale / 2**20),
                }
            )
            print(f"{name}: {runs[-1]}", file=sys.stderr)
        found[name] = {
            "seconds": median([r["seconds"] for r in runs]),
            "peak_memory_mib": median([r["peak_memory_mib"] for r in runs]),
            "runs": runs,
        }
    return found


def markdown(results: dict) -> str:
    """The results as a page."""
    head = results["header"]
    versions = ", ".join(f"{k} {v}" for k, v in head["versions"].items() if k in SHOWN)
    lines = [
        "# MNIST: step times and time to 98.5%",
        "",
        f"{head['date']}, {head['processor']}, {head['threads']} of {head['cores']} cores, "
        f"Python {head['python']}, {versions}. Median of {head['rounds']} interleaved rounds of "
        f"{head['steps']} steps. Written by `python benchmarks/mnist.py`.",
        "",
        "| backend | size | peer | us per step | ours / peer |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for backend, sizes in results["steps"].items():
        for size, times in sizes.items():
            for peer, values in times.items():
                ratio = median([a / b for a, b in zip(times["ours"], values)])
                lines.append(f"| {backend} | {size} | {peer} | {median(values):.0f} | {ratio:.2f} |")
    lines += ["", "| ratio | value |", "| --- | ---: |"]
    lines += [f"| `{name}` | {value} |" for name, value in results["ratios"].items()]
    if "to_985" in results:
        lines += [
            "",
            "Seconds from process start to the end of a run that stops at 98.5% test accuracy on the full "
            "MNIST, all cores, final test and report included:",
            "",
            "| experiment | seconds (each seed) | epochs | peak memory |",
            "| --- | --- | --- | ---: |",
        ]
        for name, run in results["to_985"].items():
            each = ", ".join(str(r["seconds"]) for r in run["runs"])
            epochs = ", ".join(f"{r['epoch']:.0f}" for r in run["runs"])
            lines.append(f"| {name} | {run['seconds']} ({each}) | {epochs} | {run['peak_memory_mib']} MiB |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
