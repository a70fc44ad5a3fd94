"""Training of the Llama experiment, as a user runs it, on the bundled sentences."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from blacksmith import launch as launcher
from blacksmith.datasets import sst2
from blacksmith.errors import ConfigError, RunError
from blacksmith.experiments.pytorch.llama import checkpoints, evaluation, train
from blacksmith.run.checkpoint import find
from blacksmith.run.order import LengthOrder
from blacksmith.run.run import Run
from blacksmith.run.schedule import learning_rate

ACCURACY = 'Checkpoint.metric = "val_accuracy"'
SGD = ['Optimizer.name = "sgd"', "Optimizer.momentum = 0.9"]
LORA = ["llama.Lora.rank = 4", "llama.Lora.alpha = 8.0"]
PARTS = ["llama.Train.accumulate = 4", *LORA]


@pytest.fixture(scope="module")
def whole(resolve_llama, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run with `PARTS`."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert launcher.run_experiment(resolve_llama(*PARTS), directory, device="cpu") == 0
    return directory


def result(directory: Path) -> dict:
    """The run's `result.json`."""
    return json.loads((directory / "result.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's tensors, the optimizer's too."""
    path = find(directory).path
    return {f"{f.name}/{k}": v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}


def test_the_tiny_file_learns_and_shows_it(stream, tmp_path, capsys):
    directory = tmp_path / "run"
    resolved = launcher.resolve(["gin/llama_sst2_tiny.gin"], ['Log.progress = "off"', "Log.every_steps = 20"])
    assert launcher.run_experiment(resolved, directory, device="cpu") == 0
    content = result(directory)
    assert content["status"] == "done"
    assert content["shared_prefix_tokens"] > 5
    count = sum(map(sum, content["test"]["confusion_matrix"]))
    answers = json.loads((directory / "eval_results.json").read_text())
    assert len(answers) == count == content["data"]["test"] == content["test"]["generated"]["examples"] == 80
    correct = sum(answer["prediction"] == answer["label"] for answer in answers)
    assert correct / count == pytest.approx(content["test"]["accuracy"])
    for answer in answers:
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert answer["prediction"] == int(answer["probabilities"][1] > answer["probabilities"][0])
        assert answer["generated"] is not None
    written = stream(directory)
    assert [line["step"] for line in written if line["split"] == "val"] == list(range(0, 261, 26))
    losses = [line["loss"] for line in written if line["split"] == "train"]
    assert losses[0] > 1 > 0.05 > losses[-1]
    assert {"gradient_norm", "learning_rate"} <= written[1].keys()
    assert written[-1]["split"] == "test"
    out, error = capsys.readouterr()
    assert re.search(r"test loss .*accuracy", out)
    assert re.search(r"shared \d+-token prefix computed once per batch", error)
    page = (directory / "report.html").read_text()
    assert "Confusion matrix" in page
    assert "negative" in page


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["llama.Train.accumulate = 4", *LORA, "llama.Lora.dropout = 0.2"],
        ["llama.Train.average = 0.7", "llama.Train.shared_prefix = False", *SGD],
        [
            'Optimizer.name = "adafactor"',
            'Schedule.name = "cosine"',
            'llama.Train.precision = "bfloat16"',
        ],
        [*LORA, 'llama.Model.dtype = "bfloat16"', 'llama.Train.precision = "bfloat16"'],
        [*LORA, "llama.Train.average = 0.7", "llama.Lora.dropout = 0.2"],
    ],
    ids=["full", "accumulate", "sgd-average", "adafactor-autocast", "bfloat16", "lora-average"],
)
def test_resume_is_bit_equal(run_llama, stream, tmp_path, settings):
    """In the middle of an epoch and after its end, at a validation and between, between training lines."""
    params = ["llama.Train.steps = 40", "Checkpoint.keep_best = 0", *settings]
    whole = tmp_path / "whole"
    run_llama(*params, "Checkpoint.every_steps = 1", "Checkpoint.keep_last = 50", directory=whole)
    for step in (4, 10, 33):
        resumed = tmp_path / f"from_{step}"
        run_llama(*params, directory=resumed, resume=str(whole / "checkpoints" / f"step_{step:08d}"))
        assert stream(resumed) == [line for line in stream(whole) if line["step"] > step], step
        assert len(weights(resumed)) > 10
        assert equal_weights(resumed, whole), step


def equal_weights(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs have the same tensors."""
    old, new = weights(one), weights(other)
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        (train, "build_model", 1, 0),  # while the run starts
        (evaluation, "score", 1, 0),  # in the validation before the first step
        (train, "token_losses", 4 * 6 + 2, 7),  # in the second part of the seventh step
        (evaluation, "score", 3, 10),
        (evaluation, "score", 4, 12),  # in the validation after the last step
        (evaluation, "score", 5, 12),  # in the test
        (evaluation, "generate", 1, 12),
    ],
    ids=["start", "first", "step", "validation", "last", "test", "generation"],
)
def test_a_stop_loses_nothing(
    run_llama, whole, stream, tmp_path, monkeypatch, stop_during, owner, name, call, step
):
    calls = stop_during(owner, name, call)
    assert run_llama(*PARTS) == 75
    if name == "token_losses":
        assert len(calls) == 4 * 7
    stopped = result(tmp_path / "run")
    assert (stopped["status"], stopped["step"]) == ("stopped", step)
    monkeypatch.undo()
    assert run_llama(*PARTS) == 0
    assert stream(tmp_path / "run") == stream(whole)
    assert equal_weights(tmp_path / "run", whole)
    for part in ("status", "best", "tested_checkpoint", "final", "test"):
        assert result(tmp_path / "run")[part] == result(whole)[part]


def test_a_stop_in_the_best_validation_keeps_its_weights(
    run_llama, stream, tmp_path, monkeypatch, stop_during
):
    """The checkpoint that the stop leaves gets its metrics when the validation is repeated."""
    params = ["Optimizer.learning_rate = 0.3", ACCURACY]
    run_llama(*params, directory=tmp_path / "whole")
    best = result(tmp_path / "whole")["best"]["step"]
    validated = [line["step"] for line in stream(tmp_path / "whole") if line["split"] == "val"]
    assert best < validated[-1]
    stop_during(evaluation, "score", 1 + validated.index(best))
    assert run_llama(*params) == 75
    assert result(tmp_path / "run")["step"] == best
    monkeypatch.undo()
    assert run_llama(*params) == 0
    assert stream(tmp_path / "run") == stream(tmp_path / "whole")
    tested = f"step_{best:08d}"
    states = []
    for directory in (tmp_path / "run", tmp_path / "whole"):
        assert result(directory)["tested_checkpoint"] == tested
        states.append(json.loads((directory / "checkpoints" / tested / "state.json").read_text()))
    assert states[0]["metrics"] == states[1]["metrics"] != {}


def test_a_loss_that_is_not_finite_names_step_and_rows(run_llama, tmp_path, monkeypatch):
    losses, calls = train.token_losses, []

    def broken(model, batch):
        calls.append(1)
        return losses(model, batch) * (torch.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(train, "token_losses", broken)
    with pytest.raises(
        RunError, match=r"loss nan .*at step 8 \(rows [\d, ]+ of the training data\); .*step_00000006"
    ) as caught:
        run_llama("Checkpoint.every_steps = 3", "Checkpoint.keep_best = 0", "llama.Data.min_words = 8")
    assert find(tmp_path / "run").step == 6
    assert result(tmp_path / "run")["status"] == "failed"
    # The rows are those of the file, whatever was held out or left out before.
    data = sst2.read("sample").split(validation=20, seed=0)
    named = [int(n) for n in re.search(r"rows ([\d, ]+) of", str(caught.value))[1].split(", ")]
    table = (Path(sst2.__file__).with_name("sample.tsv")).read_text().splitlines()
    training = [line.split("\t") for line in table[1:]]
    sentences = {s for s in data.train.sentences if len(s.split()) >= 8}
    assert len(named) == 8
    for number in named:
        assert any(column in sentences for column in training[number - 1])
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    "settings",
    [
        ["llama.Model.gradient_checkpointing = True"],
        ["llama.Model.gradient_checkpointing = True", *LORA],
        ["llama.Train.shared_prefix = False", "llama.Model.gradient_checkpointing = True"],
        ["llama.Train.shared_prefix = False", "llama.Train.accumulate = 3"],
        ["llama.Train.accumulate = 3", "llama.Train.batch_size = 9"],
        ['llama.Model.attention = "eager"'],
    ],
    ids=lambda settings: settings[0].partition(" ")[0],
)
def test_other_ways_to_compute_give_the_same_losses(run_llama, stream, tmp_path, settings):
    # Answers of different lengths: parts of a batch do not weigh alike.
    shared = ['llama.Data.labels = ("bad", "positive")', "llama.Train.batch_size = 9"]
    lora = LORA if LORA[0] in settings else []
    run_llama(*shared, *lora, directory=tmp_path / "plain")
    run_llama(*shared, *settings, directory=tmp_path / "run")
    assert len(stream(tmp_path / "run")) == len(stream(tmp_path / "plain"))
    for one, other in zip(stream(tmp_path / "run"), stream(tmp_path / "plain")):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5), one


def test_without_shared_prefix_the_plain_model_is_called(run_llama, tmp_path, monkeypatch, capsys):
    forward, training = LlamaForCausalLM.forward, []

    def recorded(model, input_ids=None, **options):
        if model.training:
            training.append(input_ids.shape == options["labels"].shape)
        return forward(model, input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", recorded)
    assert run_llama("llama.Train.shared_prefix = False") == 0
    assert training == [True] * 12
    assert result(tmp_path / "run")["shared_prefix_tokens"] == 0
    assert "no shared prefix" in capsys.readouterr().err


def test_a_template_without_a_common_beginning_is_padded(run_llama, tmp_path, capsys):
    assert run_llama('llama.Data.template = "{sentence} It was {label}"') == 0
    assert result(tmp_path / "run")["shared_prefix_tokens"] == 0
    assert "no shared prefix" in capsys.readouterr().err


@pytest.fixture
def accuracies(monkeypatch):
    """Replaces the validation's scores: the given accuracies in turn, that before the first step included."""

    def give(*values):
        scores = iter([SimpleNamespace(loss=1.0, accuracy=value) for value in values])
        monkeypatch.setattr(train, "score", lambda *_: next(scores))

    return give


@pytest.mark.parametrize(
    ("setting", "values", "step", "best"),
    [
        ("llama.Train.early_stopping = None", (0.9, 0.5, 0.7, 0.6), 12, 10),
        ("llama.Train.early_stopping = 1", (0.9, 0.7, 0.6), 10, 5),
        ("llama.Train.stop_at = 0.8", (0.5, 0.7, 0.8), 10, 10),
    ],
    ids=["best", "early_stopping", "stop_at"],
)
def test_the_best_is_tested_and_validation_may_end_the_run(
    run_llama, accuracies, tmp_path, setting, values, step, best
):
    accuracies(*values)
    assert run_llama(setting, ACCURACY) == 0
    content = result(tmp_path / "run")
    assert (content["status"], content["step"]) == ("done", step)
    assert content["tested_checkpoint"] == f"step_{best:08d}"
    assert content["best"]["step"] == best


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_averages_are_validated_saved_and_tested(run_llama, stream, tmp_path, lora):
    """And training does not see them."""
    params = [*lora, "Checkpoint.every_steps = 1", "Checkpoint.keep_last = 100"]
    run_llama(*params, directory=tmp_path / "plain")
    run_llama(*params, "Optimizer.learning_rate = 1e-30", directory=tmp_path / "start")
    run_llama(*params, "llama.Train.average = 0.3", "llama.Model.gradient_checkpointing = True")
    of = {}
    for directory in (tmp_path / "plain", tmp_path / "run"):
        of[directory.name] = [line["loss"] for line in stream(directory) if line["split"] == "train"]
    assert of["run"] == pytest.approx(of["plain"], rel=1e-6)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    average = load_file(tmp_path / "start" / "checkpoints" / "step_00000001" / name)
    for step in range(1, 13):
        at, plain = (tmp_path / run / "checkpoints" / f"step_{step:08d}" for run in ("run", "plain"))
        saved, weights, trained = (
            load_file(f) for f in (at / name, at / "unaveraged.safetensors", plain / name)
        )
        weights = {key.replace(".default.", "."): value for key, value in weights.items()}
        assert saved.keys() == weights.keys() == trained.keys()
        keep = min(0.3, step / (step + 9))
        for key, value in weights.items():
            assert torch.allclose(value, trained[key], rtol=1e-4, atol=1e-6)
            average[key] = keep * average[key] + (1 - keep) * value
            assert torch.allclose(saved[key], average[key], rtol=1e-4, atol=1e-6), (step, key)
        assert any(not torch.equal(saved[key], value) for key, value in weights.items())
    evaluated = [*params, "llama.Train.average = 0.3", "llama.Model.gradient_checkpointing = True"]
    assert run_llama(*evaluated, mode="eval") == 0  # of the saved weights: it knows no others
    content, trained = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("eval.json", "result.json")
    )
    assert content["test"] == trained["test"]
    tested = int(trained["tested_checkpoint"].removeprefix("step_"))
    (look,) = [a for a in stream(tmp_path / "run") if a["split"] == "val" and a["step"] == tested]
    assert content["val"] == {name: look[name] for name in ("loss", "accuracy")}
    resume = str(tmp_path / "run" / "checkpoints" / "step_00000005")
    with pytest.raises(ConfigError, match=r"llama\.Train\.average 0\.3 -> None"):
        run_llama(*params, directory=tmp_path / "other", resume=resume)


def test_histograms_and_a_trace_are_written(run_llama, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = [*LORA, "Log.tensorboard = True", "Log.histograms_every = 6", "llama.Train.profile_steps = 2"]
    assert run_llama(*settings) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"histograms": 0})
    events.Reload()
    names = events.Tags()["histograms"]
    assert any(name.startswith("weights/") and "lora_A" in name for name in names)
    assert any(name.startswith("gradients/") and "lora_B" in name for name in names)
    for name in names:
        steps = [event.step for event in events.Histograms(name)]
        assert steps == ([0, 6, 12] if name.startswith("weights/") else [6, 12])
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    steps = {e["name"] for e in trace["traceEvents"] if e.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(run_llama, stream, tmp_path):
    deep = [*LORA, "llama.Model.layers = 12"]
    run_llama(*deep, directory=tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    run_llama(*deep, "llama.Model.compile = True", directory=tmp_path / "run")
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] == frames["ok"] > 0
    for one, other in zip(stream(tmp_path / "run"), stream(tmp_path / "plain")):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4), one


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
def test_ten_steps_are_those_of_the_hugging_face_trainer(
    run_llama, base, stream, tmp_path, shared, pretrained, resolve_llama
):
    """Same model, adapter, data, batches and optimizer: the same losses within 1e-4."""
    settings = [
        *pretrained(base),
        *LORA,
        "llama.Train.steps = 10",
        f"llama.Train.shared_prefix = {shared}",
        "Optimizer.learning_rate = 3e-3",
        "Optimizer.weight_decay = 0.01",
        "Optimizer.global_clip_norm = 0.5",
        'llama.Data.labels = ("bad", "positive")',
        "Log.every_steps = 1",
    ]
    run_llama(*settings)
    ours = [line["loss"] for line in stream(tmp_path / "run") if line["split"] == "train"]

    resolved = resolve_llama(*settings)
    config = resolved.config
    options = {"experiment": "llama", "checkpoint_format": "", "backend": "torch", "device": "cpu"}
    other = Run(tmp_path / "trainer", config, **options)
    model, tokenizer = checkpoints.build_model(other)
    encoded = train.encode_examples(other, model, tokenizer, sst2.read("sample").split(20).train, "training")
    order = LengthOrder(encoded.lengths, 8, config.train.by_length, config.run.seed)
    rows = [row for step in range(10) for row in order.rows(step).tolist()]

    def collate(some):
        width = max(len(one["ids"]) for one in some) + 5
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for one in some:
            tokens, answer, space = one["ids"], one["answer"], width - len(one["ids"])
            batch["input_ids"].append(tokens + [0] * space)
            batch["attention_mask"].append([1] * len(tokens) + [0] * space)
            batch["labels"].append([-100] * answer + tokens[answer:] + [-100] * space)
        return {name: torch.tensor(value) for name, value in batch.items()}

    losses = []

    class Trainer(transformers.Trainer):
        def training_step(self, *arguments, **options):
            losses.append(super().training_step(*arguments, **options))
            return losses[-1]

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        warmup_steps=2,
        optim="adamw_torch",
        weight_decay=0.01,
        max_grad_norm=0.5,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dataset = [encoded.correct[row]._asdict() for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
    trainer.create_optimizer()
    # Ours takes its first step of a warm-up at a rate above 0, theirs at 0.
    peak = config.optimizer.learning_rate
    rates = [learning_rate(config.schedule, peak, step, 10) for step in range(11)]
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda s: rates[s] / 3e-3)
    trainer.train()
    theirs = [float(loss) for loss in losses]
    assert len(ours) == len(theirs) == 10
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert max(ours) - min(ours) > 0.1
