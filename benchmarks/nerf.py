"""How well and how fast the NeRF fields learn a scene: PSNR over CPU time, rays per second, memory.

    python benchmarks/nerf.py              # the bundled anvil; writes benchmarks/results/nerf.{json,md}
    python benchmarks/nerf.py --lego=DIR   # also lego from "NeRF synthetic" at 200x200 and scaled to 100x100

Seconds are CPU seconds of training on both cores, halved, since wall time on a shared machine says little.
They include the work between steps (occupancy, levels, metrics), but not loading the scene, the hull or
evaluation. PSNR is the mean over all test views, over white. Each run has its own process and a fixed number
of steps, chosen to end within its time budget. A run that took longer is scored by its last evaluation within
the budget.

The paper's NeRF (gin/nerf_vanilla.gin, 512 rays per step) is scored on 2,000 random pixels of the test views.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine, open_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
THREADS = 2

# name: (scene, downscale, Gin file, steps, seconds at which to evaluate (the last is the budget), bindings)
NO_HULL = ["nerf.Data.hull = False"]
FINEST = ["nerf.Grid.resolutions = (64, 112, 168)"]
RUNS = {
    "anvil_60s": ("anvil", 1, "nerf_blender", 900, (10, 30, 60), []),
    "lego100_60s": ("lego", 2, "nerf_blender", 900, (10, 30, 60), []),
    "lego200_180s": ("lego", 1, "nerf_blender_fine", 2700, (30, 60, 180), []),
    "lego100_no_hull_30s": ("lego", 2, "nerf_blender", 450, (10, 30), NO_HULL),
    "lego100_no_hull_120s": ("lego", 2, "nerf_blender", 1800, (30, 60, 120), NO_HULL),
    "lego200_600s": ("lego", 1, "nerf_blender_fine", 8000, (60, 180, 300, 600), FINEST),
}
VANILLA_RUNS = {
    "anvil_vanilla_120s": ("anvil", 1, "nerf_vanilla", 200000, (60, 120), ["nerf.Train.rays = 512"]),
    "lego200_vanilla_120s": ("lego", 1, "nerf_vanilla", 200000, (60, 120), ["nerf.Train.rays = 512"]),
}
SINGLE = ("lego100_no_hull_120s", "lego200_600s")  # too long for three seeds


def main() -> int:
    """Runs the benchmark, each training in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lego", help="directory of lego at 200x200")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind; 3 for published results")
    parser.add_argument("--only", nargs="*", help="only the runs with these names")
    parser.add_argument("--steps", type=float, default=1.0, help="factor for all numbers of steps")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where nerf.json and nerf.md go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        json.dump(child(json.loads(arguments.child)), sys.stdout)
        return 0
    results = {"header": header(arguments), "ratios": {}, "psnr": {}, "runs": []}
    for name, (scene, downscale, gin, steps, looks, bindings) in (RUNS | VANILLA_RUNS).items():
        if (scene == "lego" and not arguments.lego) or (arguments.only and name not in arguments.only):
            continue
        one = name in SINGLE or name in VANILLA_RUNS
        for seed in range(1 if one else arguments.seeds):
            print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
            spec = {
                "scene": arguments.lego if scene == "lego" else None,
                "downscale": downscale,
                "gin": gin,
                "steps": max(1, round(steps * arguments.steps)),
                "looks": looks,
                "bindings": [*bindings, f"Run.seed = {seed}"],
            }
            run = {"name": name, "seed": seed, "steps": spec["steps"], **run_child(spec)}
            print(json.dumps(run), file=sys.stderr, flush=True)
            results["runs"].append(run)
            save(results, arguments.output)
    print((arguments.output / "nerf.md").read_text())
    return 0


def save(results: dict, output: Path) -> None:
    """Writes the results so far."""
    runs = results["runs"]
    results["psnr"] = {
        name: min(run["psnr"] for run in runs if run["name"] == name) for name in RUNS if named(runs, name)
    }
    fast, slow = named(runs, "anvil_60s"), named(runs, "anvil_vanilla_120s")
    if fast:
        shares = [run["lightning_share"] for run in fast if "lightning_share" in run]
        results["ratios"]["lightning_share_of_step"] = round(statistics.median(shares), 4)
    if fast and slow:
        rates = statistics.median(run["rays_per_second"] for run in fast)
        results["ratios"]["rays_per_s_vs_vanilla"] = round(rates / slow[0]["rays_per_second"], 1)
    output.mkdir(parents=True, exist_ok=True)
    (output / "nerf.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "nerf.md").write_text(markdown(results))


def named(runs: list[dict], name: str) -> list[dict]:
    """The runs of one kind."""
    return [run for run in runs if run["name"] == name]


def header(arguments: argparse.Namespace) -> dict:
    """Hardware, versions and settings."""
    return machine() | {"threads": THREADS, "seeds": arguments.seeds}


def run_child(spec: dict) -> dict:
    """Runs `child` in its own process."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(THREADS))
    with tempfile.TemporaryDirectory() as directory:
        spec = {**spec, "workdir": f"{directory}/run"}
        command = [sys.executable, __file__, f"--child={json.dumps(spec)}"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def child(spec: dict) -> dict:
    """Trains one field and evaluates it on the test views at the given seconds."""
    bindings = [
        f"nerf.Data.scene = {spec['scene']!r}",
        f"nerf.Data.downscale = {spec['downscale']}",
        f"nerf.Train.steps = {spec['steps']}",
        f"nerf.Train.evaluate_every_steps = {spec['steps']}",
        "nerf.Train.validation_views = 1",
        'Log.progress = "off"',
        "Checkpoint.every_steps = None",
        *spec["bindings"],
    ]
    run = open_run([str(ROOT / "gin" / f"{spec['gin']}.gin")], bindings, spec["workdir"], "cpu")
    from blacksmith.experiments.lightning.nerf import train
    from blacksmith.experiments.lightning.nerf.data import open_scene_of

    with run.opened():
        scene = open_scene_of(run)
        start = time.process_time()
        module, loader, loop = train.prepare(run, scene)
        setup = (time.process_time() - start) / THREADS
        clock = make_clock(scene, module, spec)
        loop.between()
        train.fit(run, module, loader, callbacks=[clock])
        return {
            **clock.result(),
            "setup_seconds": round(setup, 2),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }


def make_clock(scene, module, spec):
    """A Lightning callback that counts CPU seconds of training and evaluates on the test views."""
    import lightning as L
    import numpy as np
    import torch

    from blacksmith.experiments.lightning.nerf.scores import psnr
    from blacksmith.models.pytorch.nerf.rendering import camera_rays, render_image

    views = scene.views("test")
    vanilla = spec["gin"] == "nerf_vanilla"
    white = torch.ones(3)

    def evaluate() -> tuple[float, float]:
        """Mean PSNR, and CPU seconds per frame."""
        start = time.process_time()
        if vanilla:
            random, errors = np.random.default_rng(0), []
            for number, camera in enumerate(views.cameras):
                area = camera.width * camera.height
                pixels = random.integers(0, area, 2000 // len(views))
                rays = camera_rays(camera, torch.from_numpy(pixels))
                seen = module.field.render(*rays, white).rgb.clamp(0, 1).numpy()
                truth = views.picture(number, (1, 1, 1)).reshape(-1, 3)[pixels]
                errors.append(np.square(seen - truth).mean())
            frames = 2000 / area
            score = float(-10 * np.log10(np.mean(errors)))
        else:
            frames, scores = len(views), []
            for number, camera in enumerate(views.cameras):
                rgb = render_image(module.field, camera, white).rgb.clamp(0, 1).numpy()
                scores.append(psnr(rgb, views.picture(number, (1, 1, 1))))
            score = float(np.mean(scores))
        return score, (time.process_time() - start) / THREADS / frames

    class Clock(L.Callback):
        """CPU seconds without those of evaluation."""

        def __init__(self) -> None:
            self.began = self.paused = 0.0
            self.own = 0.0
            self.looks: list[dict] = []
            self.waiting = list(spec["looks"])

        @property
        def seconds(self) -> float:
            return (time.process_time() - self.began) / THREADS - self.paused

        def setup(self, trainer, pl_module, stage) -> None:
            # The cost without Lightning: the step itself, and our own work between steps.
            for name in ("training_step", "on_train_batch_start", "on_train_batch_end"):
                setattr(module, name, self.timed(getattr(module, name)))
            loader = module._loader
            loader._next = self.timed(loader._next)
            module.backward = lambda loss: self.timed(loss.backward)()
            module.optimizer_zero_grad = self.timed(module.optimizer_zero_grad)
            # Adam's arithmetic, which its `step` calls after Lightning's closure.
            functions = sys.modules[torch.optim.Adam.__module__]
            functions.adam = self.timed(functions.adam)

        def timed(self, function):
            def call(*arguments, **options):
                start = time.process_time()
                try:
                    return function(*arguments, **options)
                finally:
                    self.own += (time.process_time() - start) / THREADS

            return call

        def on_train_start(self, trainer, pl_module) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            last = trainer.global_step >= spec["steps"]
            if last or (self.waiting and self.seconds >= self.waiting[0]):
                self.evaluate_now(trainer)
                over = vanilla and not self.waiting
                trainer.should_stop = trainer.should_stop or over

        def evaluate_now(self, trainer) -> None:
            seconds = self.seconds
            while self.waiting and seconds >= self.waiting[0]:
                self.waiting.pop(0)
            score, frame = evaluate()
            drawn = module._loader.drawn
            self.looks.append(
                {
                    "seconds": round(seconds, 1),
                    "step": trainer.global_step,
                    "psnr": round(score, 3),
                    "rays_per_second": round(drawn / seconds),
                    "frame_seconds": round(frame, 4),
                }
            )
            self.paused += self.seconds - seconds
            self.own_so_far = self.own  # the last step's validation and checkpoint follow the last evaluation

        def on_train_end(self, trainer, pl_module) -> None:
            self.total = self.looks[-1]["seconds"]

        def result(self) -> dict:
            budget = spec["looks"][-1]
            within = [look for look in self.looks if look["seconds"] <= budget * 1.01]
            if not within:
                raise SystemExit(f"no evaluation within {budget} s: the machine is too slow for these steps")
            return {
                "psnr": within[-1]["psnr"],
                "rays_per_second": self.looks[-1]["rays_per_second"],
                "frame_seconds": self.looks[-1]["frame_seconds"],
                "lightning_share": round(1 - self.own_so_far / self.total, 4),
                "looks": self.looks,
            }

    return Clock()


def markdown(results: dict) -> str:
    """The results as a page."""
    head = results["header"]
    lines = [
        "# NeRF: PSNR over CPU time",
        "",
        f"{head['date']}, {head['processor']}, {head['cores']} cores, {head['threads']} threads, Python "
        f"{head['python']}, PyTorch {head['versions'].get('torch')}, Lightning "
        f"{head['versions'].get('lightning')}. Written by `python benchmarks/nerf.py`; its docstring says "
        "what is measured.",
        "",
        "| ratio | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in results["ratios"].items()),
        "",
        "| run | seed | seconds: PSNR in dB | rays/s | seconds per frame | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in results["runs"]:
        looks = ", ".join(f"{look['seconds']:.0f}: {look['psnr']:.2f}" for look in run["looks"])
        lines.append(
            f"| {run['name']} | {run['seed']} | {looks} | {run['rays_per_second']:,} | "
            f"{run['frame_seconds']:.3f} | {run['peak_memory_gib']:.2f} GiB |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
