"""LoRA fine-tuning of a Llama on SST-2: examples per second, peak memory and loss, against the usual stack.

    python benchmarks/llama.py                # the bundled sentences
    python benchmarks/llama.py --sst2=DIR     # SST-2 as TSV files in GLUE's layout

Writes benchmarks/results/llama.{json,md}. Four ways to take the same steps, interleaved, each in its own
process:

    pad128    Hugging Face Trainer and peft, every row padded to --length tokens
    dynamic   the same, padded to the longest row of the batch
    padded    this package with `llama.Train.shared_prefix = False`
    shared    this package

All have the same weights, adapter and batches (ours, sorted by length like the Trainer's group_by_length),
AdamW with the same learning rate, and one thread. Seconds are CPU seconds of the steps after the first, since
wall time on a shared machine says little. Peak memory is that of the process, including its imports. The
model has SmolLM2-135M's shape with --layers of its 30 layers (0: all), random weights and SmolLM2's tokenizer
(`python -m blacksmith.assets smollm2-135m`).

For a GPU, use --device=cuda --model-shape=llama-3.2-1b --layers=0 --dtype=bfloat16. Seconds are then wall
seconds and memory is the device's.
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
WAYS = ("pad128", "dynamic", "padded", "shared")

SHAPES = {
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
}


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sst2", default="sample", help="as llama.Data.source")
    parser.add_argument("--model-shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, 0 for all")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first is not timed")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="padded length of pad128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="*", choices=WAYS, help="only these")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where llama.json and llama.md go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return 0
    results = {"header": header(arguments), "ratios": {}, "runs": []}
    with tempfile.TemporaryDirectory() as directory:
        model = f"{directory}/model"
        spec = {**vars(arguments), "output": None, "child": None, "model": model}
        run_child({**spec, "way": "model"})
        for turn in range(arguments.rounds):
            for way in arguments.only or WAYS:
                print(f"{way}, round {turn + 1} of {arguments.rounds} ...", file=sys.stderr, flush=True)
                run = {"way": way, **run_child({**spec, "way": way, "workdir": f"{directory}/{way}-{turn}"})}
                print(json.dumps(run), file=sys.stderr, flush=True)
                results["runs"].append(run)
    results["ratios"] = ratios(results["runs"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "llama.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "llama.md").write_text(markdown(results))
    print((arguments.output / "llama.md").read_text())
    return 0


def header(arguments: argparse.Namespace) -> dict:
    """Hardware, versions and settings."""
    names = ("model_shape", "layers", "steps", "rounds", "batch", "length", "threads", "device", "dtype")
    source = "the bundled sentences" if arguments.sst2 == "sample" else Path(arguments.sst2).name
    return machine() | {name: getattr(arguments, name) for name in names} | {"data": source}


def run_child(spec: dict) -> dict:
    """Runs `child` in its own process."""
    threads = str(spec["threads"])
    environment = dict(
        os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="false"
    )
    command = [sys.executable, __file__, f"--child={json.dumps(spec)}"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def child(spec: dict) -> dict:
    """Takes the steps in one of the ways, or writes the model."""
    if spec["way"] == "model":
        return make_model(spec)
    clock = Clock(spec)
    if spec["way"] in ("pad128", "dynamic"):
        with_trainer(spec, clock)
    else:
        with_blacksmith(spec, clock)
    return clock.result()


class Clock:
    """Seconds, losses and tokens of the steps."""

    def __init__(self, spec: dict) -> None:
        self.cuda = spec["device"].startswith("cuda")
        self.batch = spec["batch"]
        self.tokens: list[int] = []
        self.ends: list[float] = []
        self.losses: list[float] = []

    def stepped(self, loss, tokens: int) -> None:
        """Records a step: its loss and how many tokens it computed."""
        self.tokens.append(tokens)
        self.losses.append(float(loss))  # waits for an accelerator
        self.ends.append(time.perf_counter() if self.cuda else time.process_time())

    def result(self) -> dict:
        """The measurements as JSON values."""
        import torch

        seconds = self.ends[-1] - self.ends[0]
        memory = (
            torch.cuda.max_memory_allocated()
            if self.cuda
            else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        return {
            "seconds": round(seconds, 3),
            "examples_per_second": round(self.batch * (len(self.ends) - 1) / seconds, 4),
            "tokens_per_second": round(sum(self.tokens[1:]) / seconds, 1),
            "peak_memory_gib": round(memory / 2**30, 3),
            "losses": self.losses,
        }


def make_model(spec: dict) -> dict:
    """Writes a model with random weights, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from blacksmith.models.pytorch.llama import loading

    _, tokenizer = loading.load_model("smollm2-135m")
    shape = dict(SHAPES[spec["model_shape"]])
    if spec["layers"]:
        shape["num_hidden_layers"] = spec["layers"]
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": 2048, **shape},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, spec["dtype"]))
    model.save_pretrained(spec["model"])
    tokenizer.save_pretrained(spec["model"])
    return {}


def bindings(spec: dict) -> list[str]:
    """The settings; only `shared_prefix` depends on the way."""
    return [
        f"llama.Data.source = {spec['sst2']!r}",
        "llama.Data.validation = 8",
        "llama.Data.min_words = 1",
        f"llama.Data.max_length = {spec['length']}",
        f"llama.Model.name_or_path = {spec['model']!r}",
        f"llama.Model.dtype = {spec['dtype']!r}",
        f"llama.Train.precision = {spec['dtype']!r}",
        f"llama.Train.steps = {spec['steps']}",
        f"llama.Train.batch_size = {spec['batch']}",
        "Optimizer.learning_rate = 1e-4",
        f"llama.Train.evaluate_every_steps = {spec['steps'] + 1}",
        f"llama.Train.shared_prefix = {spec['way'] == 'shared'}",
        'Schedule.name = "constant"',
        "Schedule.warmup_steps = 0",
        "Schedule.decay_steps = None",
        "Schedule.final_fraction = 0.0",
        "Checkpoint.every_steps = None",
        "Checkpoint.keep_best = 0",
        'Log.progress = "off"',
        "Log.tensorboard = False",
    ]


def llama_run(spec: dict):
    """A run of the experiment, not opened yet."""
    gin = str(ROOT / "gin" / "llama_sst2.gin")
    return open_run([gin], bindings(spec), spec["workdir"], spec["device"])


class Enough(Exception):
    """The steps have been taken."""


def with_blacksmith(spec: dict, clock: Clock) -> None:
    """Our experiment, stopped before its final test."""
    from blacksmith.experiments.pytorch.llama import train
    from blacksmith.run.loop import Loop

    class Timed(Loop):
        def log(self, values, **counts):
            super().log(values, **counts)
            clock.stepped(values["loss"], counts["tokens"])
            if self.step == spec["steps"]:
                raise Enough

    train.Loop = Timed
    run = llama_run(spec)
    try:
        with run.opened():
            train.train(run)
    except Enough:
        pass


def with_trainer(spec: dict, clock: Clock) -> None:
    """Hugging Face's Trainer on the same model, adapter and batches."""
    import torch
    import transformers

    from blacksmith.experiments.pytorch.llama import checkpoints, data
    from blacksmith.run.order import LengthOrder

    run = llama_run(spec)
    config = run.config
    model, tokenizer = checkpoints.build_model(run)
    split = data.read_data(run).split(config.data.validation, config.run.seed)
    encoded = data.encode_examples(run, model, tokenizer, split.train, "training")
    order = LengthOrder(encoded.lengths, spec["batch"], config.train.by_length, config.run.seed)
    rows = [row for step in range(spec["steps"]) for row in order.rows(step).tolist()]

    def collate(some: list[dict]) -> dict:
        width = spec["length"] if spec["way"] == "pad128" else max(len(row["ids"]) for row in some)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in some:
            tokens, answer = row["ids"], row["answer"]
            space = width - len(tokens)
            batch["input_ids"].append(tokens + [0] * space)
            batch["attention_mask"].append([1] * len(tokens) + [0] * space)
            batch["labels"].append([-100] * answer + tokens[answer:] + [-100] * space)
        return {name: torch.tensor(value) for name, value in batch.items()}

    class Trainer(transformers.Trainer):
        def training_step(self, model, inputs, *arguments, **options):
            self.tokens = inputs["input_ids"].numel()
            self.latest = super().training_step(model, inputs, *arguments, **options)
            return self.latest

    class Ends(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.stepped(trainer.latest, trainer.tokens)

    settings = transformers.TrainingArguments(
        output_dir=spec["workdir"],
        per_device_train_batch_size=spec["batch"],
        max_steps=spec["steps"],
        learning_rate=config.optimizer.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.global_clip_norm,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        bf16=spec["dtype"] == "bfloat16",
        use_cpu=not clock.cuda,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=clock.cuda,
    )
    dataset = [encoded.correct[row]._asdict() for row in rows]
    trainer = Trainer(
        model=model, args=settings, train_dataset=dataset, data_collator=collate, callbacks=[Ends()]
    )
    trainer.train()


def ratios(runs: list[dict]) -> dict:
    """Medians over the rounds, ours relative to each baseline."""
    ways = {run["way"] for run in runs}
    rate = {way: statistics.median(r["examples_per_second"] for r in runs if r["way"] == way) for way in ways}
    memory = {way: statistics.median(r["peak_memory_gib"] for r in runs if r["way"] == way) for way in ways}
    found = {}
    for way in ("pad128", "dynamic", "padded"):
        if {"shared", way} <= ways:
            found[f"examples_per_s_vs_{way}"] = round(rate["shared"] / rate[way], 2)
    if {"shared", "pad128"} <= ways:
        found["peak_memory_vs_pad128"] = round(memory["shared"] / memory["pad128"], 3)
    losses = [run["losses"] for run in runs]
    found["max_loss_difference"] = max(max(step) - min(step) for step in zip(*losses))
    return found


def markdown(results: dict) -> str:
    """The results as a page."""
    head = results["header"]
    lines = [
        "# Llama on SST-2: examples per second and memory",
        "",
        f"{head['date']}, {head['processor']}, {head['device']}, {head['threads']} threads, Python "
        f"{head['python']}, PyTorch {head['versions'].get('torch')}, transformers "
        f"{head['versions'].get('transformers')}, peft {head['versions'].get('peft')}. "
        f"{head['model_shape']}'s shape with {head['layers'] or 'all'} layers, {head['dtype']}, batches "
        f"of {head['batch']}, {head['data']}. Written by `python benchmarks/llama.py`; its docstring says "
        "what is measured.",
        "",
        "| ratio | value |",
        "| --- | --- |",
        *(f"| {name} | {value:.3g} |" for name, value in results["ratios"].items()),
        "",
        "| way | round | examples/s | peak memory | loss after the last step |",
        "| --- | --- | --- | --- | --- |",
    ]
    seen: dict[str, int] = {}
    for run in results["runs"]:
        seen[run["way"]] = turn = seen.get(run["way"], 0) + 1
        lines.append(
            f"| {run['way']} | {turn} | {run['examples_per_second']:.2f} | "
            f"{run['peak_memory_gib']:.2f} GiB | {run['losses'][-1]:.6f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
