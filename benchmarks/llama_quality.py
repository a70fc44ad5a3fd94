"""How well gin/llama_sst2.gin learns: accuracy on SST-2's dev set after fixed numbers of steps.

    python benchmarks/llama_quality.py --sst2=DIR     # SST-2 as TSV files in GLUE's layout; hours on a CPU

Writes benchmarks/results/llama_quality.{json,md}. The runs are kept in --runs, one per seed. A finished run
with the current settings, data and packages is not trained again. The adapters at --steps are evaluated with
`--mode=eval`; the dev set is used neither for training nor to choose the best checkpoint. Finally, peft and
transformers load the last adapter of the first seed in a process without this package and classify a few
sentences.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
GIN = "gin/llama_sst2.gin"
SENTENCES = (
    "I have rarely laughed so much in a cinema.",
    "Two hours of my life that I would like to have back.",
    "The script is thin, but the actors make it sing.",
    "Every joke can be seen coming from a mile away.",
    "A tender portrait of a friendship, beautifully shot.",
    "It looks expensive and feels cheap.",
)


def main() -> int:
    """Trains what is missing, evaluates it and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sst2", help="directory of SST-2")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    looks = [50, 100, 150, 200, 250, 300]
    parser.add_argument("--steps", type=int, nargs="*", default=looks, help="checkpoints to evaluate")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--runs", type=Path, default=Path("runs/llama_quality"), help="where the runs are")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        print(json.dumps(ask(arguments.ask)))
        return 0
    if not arguments.sst2:
        parser.error("--sst2=DIR is required: this benchmark needs the real data")

    runs = [measure(arguments, seed) for seed in arguments.seeds]
    last = arguments.runs / f"seed{arguments.seeds[0]}" / "checkpoints" / f"step_{arguments.steps[-1]:08d}"
    command = [sys.executable, __file__, f"--ask={last.absolute()}"]
    from blacksmith import files

    environment = {**os.environ, "BLACKSMITH_CACHE": str(files.cache_dir())}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd="/", env=environment)
    asked = json.loads(done.stdout)
    results = {"header": machine(), "gin_file": GIN, "runs": runs, "asked_without_blacksmith": asked}
    (arguments.output / "llama_quality.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "llama_quality.md").write_text(markdown(results))
    print(markdown(results))
    return 0


def measure(arguments: argparse.Namespace, seed: int) -> dict:
    """Trains and evaluates one seed; returns its validation and dev metrics."""
    directory = (arguments.runs / f"seed{seed}").absolute()
    result = directory / "result.json"
    bindings = [
        f"llama.Data.source={str(Path(arguments.sst2).absolute())!r}",
        f"Run.seed={seed}",
        "Checkpoint.keep_last=1000",
    ]
    if not result.exists() or json.loads(result.read_text())["status"] != "done":
        parameters = [f"--gin_param={binding}" for binding in bindings]
        launch(arguments.threads, f"--gin_file={GIN}", *parameters, f"--workdir={directory}")
    check(directory, bindings)
    dev = {}
    for step in arguments.steps:
        evaluated = directory / f"dev_{step}"
        if not (evaluated / "eval.json").exists():
            checkpoint = directory / "checkpoints" / f"step_{step:08d}"
            launch(
                arguments.threads,
                f"--gin_file={directory / 'config.gin'}",
                "--mode=eval",
                f"--resume={checkpoint}",
                "--gin_param=llama.Evaluation.generate=0",
                f"--workdir={evaluated}",
            )
        dev[step] = json.loads((evaluated / "eval.json").read_text())["test"]["accuracy"]
    trained, environment = (
        json.loads((directory / name).read_text()) for name in ("result.json", "environment.json")
    )
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "started": environment["started"],
        "dev_accuracy": dev,
        "validation": {
            line["step"]: {"accuracy": line["accuracy"], "loss": line["loss"]}
            for line in lines
            if line["split"] == "val"
        },
        "seconds": trained["seconds"],
        "threads": int(environment["variables"].get("OMP_NUM_THREADS", environment["cpu_count"])),
        "peak_memory_bytes": trained["peak_memory_bytes"],
        "data": {name: trained["data"][name] for name in ("sha256", "train", "validation", "test")},
        "tested_checkpoint": trained["tested_checkpoint"],
        "tested": {name: trained["test"][name] for name in ("accuracy", "confusion_matrix", "generated")},
    }


def check(directory: Path, bindings: list[str]) -> None:
    """Refuses a run with settings, data or packages that differ from the current ones."""
    from blacksmith import config, launch
    from blacksmith.datasets import sst2
    from blacksmith.run import provenance

    now = config.as_dict(launch.resolve([str(ROOT / GIN)], bindings).config)
    environment = json.loads((directory / "environment.json").read_text())
    same = {
        "settings": json.loads((directory / "config.json").read_text()) == json.loads(json.dumps(now)),
        "data": environment["data"]["sha256"] == sst2.read(now["data"]["source"]).sha256,
        "packages": environment["versions"] == provenance.versions(),
    }
    if different := [name for name, equal in same.items() if not equal]:
        raise SystemExit(f"{directory} has different {' and '.join(different)}; move it away")


def launch(threads: int, *flags: str) -> None:
    """Runs the launcher; its output goes to the console."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "blacksmith.launch", *flags], cwd=ROOT, env=environment, check=True)


def ask(checkpoint: Path) -> list[dict]:
    """The answers of the model with an adapter, using only peft and transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((checkpoint.parent.parent / "config.json").read_text())
    (file,) = (Path(os.environ["BLACKSMITH_CACHE"]) / config["model"]["name_or_path"]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, checkpoint).eval()
    prompt = config["data"]["template"].removesuffix("{label}").rstrip()
    answers = []
    for sentence in SENTENCES:
        tokens = tokenizer(prompt.replace("{sentence}", sentence), return_tensors="pt")
        output = model.generate(**tokens, max_new_tokens=4, do_sample=False)
        text = tokenizer.decode(output[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)
        answers.append({"sentence": sentence, "answer": text.strip()})
    if "blacksmith" in sys.modules:
        raise SystemExit("the adapter must be loaded without this package")
    return answers


def markdown(results: dict) -> str:
    """The results as a page."""
    head, runs = results["header"], results["runs"]
    steps = list(runs[0]["dev_accuracy"])
    lines = [
        "# Llama on SST-2: accuracy on the dev set",
        "",
        f"{head['date']}, {head['processor']}, Python {head['python']}, PyTorch "
        f"{head['versions'].get('torch')}, transformers {head['versions'].get('transformers')}, peft "
        f"{head['versions'].get('peft')}. `{results['gin_file']}` on SST-2; written by "
        "`python benchmarks/llama_quality.py`, whose docstring says what is measured.",
        "",
        f"| seed | {' | '.join(f'step {step}' for step in steps)} | best by validation | minutes | threads | "
        "GB |",
        f"| --- |{' --- |' * len(steps)} --- | --- | --- | --- |",
    ]
    for run in runs:
        dev = " | ".join(f"{run['dev_accuracy'][step]:.2%}" for step in steps)
        tested = f"{run['tested']['accuracy']:.2%} ({run['tested_checkpoint']})"
        cost = f"{run['seconds'] / 60:.0f} | {run['threads']} | {run['peak_memory_bytes'] / 1e9:.1f}"
        lines.append(f"| {run['seed']} | {dev} | {tested} | {cost} |")
    if len(runs) > 1:
        columns = [[run["dev_accuracy"][step] for run in runs] for step in steps]
        columns.append([run["tested"]["accuracy"] for run in runs])
        means = " | ".join(f"{statistics.mean(column):.2%}" for column in columns)
        lines.append(f"| mean | {means} | | | |")
    lines += ["", "Answers with the adapter of the first seed, using only peft and transformers:", ""]
    lines += [f"- {row['sentence']} *{row['answer']}*" for row in results["asked_without_blacksmith"]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
