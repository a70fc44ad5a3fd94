"""Damages small valid inputs at random and gives them to the program.

Used by `reliability.py`. Each format has a function that writes a valid input into a directory, and a
command that reads it. A mutant is a copy in which one file was damaged: bytes flipped, removed, repeated or
replaced; in text also whole words, numbers and lines. It is read in a fork of a process that has imported
everything, so that it takes a fraction of a second.
"""

import contextlib
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SECONDS = 60  # longer is a hang
MEMORY = 16 << 30
MNIST = [
    "--gin_file=gin/mnist_torch.gin",
    "--gin_param=mnist.Model.hidden = (8,)",
    "--gin_param=mnist.Train.epochs = 1",
    "--gin_param=mnist.Train.batch_size = 16",
    "--gin_param=mnist.Data.validation = 20",
]
NERF = [
    "--gin_file=gin/nerf_blender.gin",
    "--gin_param=nerf.Grid.resolutions = (8, 10, 12)",
    "--gin_param=nerf.Grid.upsample_at = (0.2, 0.5)",
    "--gin_param=nerf.Grid.refresh_at = (0.4, 0.7)",
    "--gin_param=nerf.Grid.occupancy_resolution = 32",
    "--gin_param=nerf.Train.steps = 3",
    "--gin_param=nerf.Train.samples = 1024",
    "--gin_param=nerf.Train.evaluate_every_steps = 2",
    "--gin_param=nerf.Train.validation_views = 1",
    "--gin_param=nerf.Results.video_frames = 0",
    "--gin_param=Schedule.warmup_steps = 1",
]
LLAMA = [
    "--gin_file=gin/llama_sst2_tiny.gin",
    "--gin_param=llama.Train.epochs = None",
    "--gin_param=llama.Train.steps = 2",
    "--gin_param=llama.Train.batch_size = 4",
    "--gin_param=llama.Data.validation = 6",
    "--gin_param=llama.Evaluation.generate = 2",
    "--gin_param=Schedule.warmup_steps = 1",
]
SIZES = ["--gin_param=llama.Model.hidden_size = 16", "--gin_param=llama.Model.intermediate_size = 24"]
COMMON = ["--device=cpu", "--gin_param=Log.tensorboard = False", "--gin_param=Log.progress = 'off'"]


@dataclass(frozen=True)
class Format:
    """An input format.

    Attributes:
      write: writes a valid input into an empty directory.
      command: the launcher's flags that read an input directory, without `--workdir`.
      files: which of its files are damaged, a pattern.
      run: whether the input is a run directory, which is also the working directory.
      repair: makes hashes valid again after the damage, or None.
    """

    write: Callable[[Path], None]
    command: Callable[[Path], list[str]]
    files: str = "*"
    run: bool = False
    repair: Callable[[Path], None] | None = None


# --- valid inputs ---


def write_idx(directory: Path) -> None:
    """120 training and 40 test digits as idx files."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pictures = rng.integers(0, 256, (count, 28, 28), np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (directory / f"{part}-images-idx3-ubyte").write_bytes(header + pictures.tobytes())
        (directory / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, count) + labels.tobytes()
        )


def write_gz(directory: Path) -> None:
    """The same, compressed."""
    write_idx(directory)
    for path in list(directory.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def write_scene(directory: Path) -> None:
    """Eight views of a disc in the format of Blender's scenes."""
    from PIL import Image

    angles = iter(np.linspace(0, 2 * np.pi, 8, endpoint=False))
    for split, count in (("train", 6), ("val", 1), ("test", 1)):
        (directory / split).mkdir()
        frames = []
        for i in range(count):
            c, s = float(np.cos(a := next(angles))), float(np.sin(a))
            pose = [[-s, 0, c, 4 * c], [c, 0, s, 4 * s], [0, 1, 0, 0], [0, 0, 0, 1]]
            rows, columns = np.mgrid[:16, :16] - 7.5
            alpha = (255 * (rows**2 + columns**2 < 25)).astype(np.uint8)
            rgba = np.dstack([np.full((16, 16), 40 * i, np.uint8), alpha, alpha // 2, alpha])
            Image.fromarray(rgba).save(directory / split / f"r_{i}.png")
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": pose})
        content = {"camera_angle_x": 0.7, "frames": frames}
        (directory / f"transforms_{split}.json").write_text(json.dumps(content))


def write_texts(suffix: str) -> Callable[[Path], None]:
    """Returns a function that writes 24 training and 8 test sentences in one of the text formats."""

    def write(directory: Path) -> None:
        import datasets

        words = ["good", "bad", "fine", "awful", "lovely", "dull", "great", "poor"]
        for split, count in (("train", 24), ("test", 8)):
            rows = {
                "sentence": [f"a {words[i % 8]} film number {i} {split}" for i in range(count)],
                "label": [1 - i % 2 for i in range(count)],
            }
            table, path = datasets.Dataset.from_dict(rows), directory / f"{split}.{suffix}"
            if suffix == "parquet":
                table.to_parquet(path)
            elif suffix in ("json", "jsonl"):
                table.to_json(path, lines=suffix == "jsonl")
            else:
                table.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)

    return write


def write_model(directory: Path) -> None:
    """A model directory of random weights."""
    from blacksmith.models.pytorch.llama import loading
    from blacksmith.models.pytorch.llama.tokens import byte_tokenizer

    tokenizer = byte_tokenizer()
    loading.make_model(len(tokenizer), 16, 24, 1, 2, 1, 512, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_gguf(directory: Path) -> None:
    """A GGUF file of random weights."""
    import gguf

    from blacksmith.models.pytorch.llama.tokens import byte_tokenizer

    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(tokens) + 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, "Ġa"])
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    shapes = {"token_embd": (len(tokens) + 1, 16), "output_norm": (16,)}
    block = {
        "attn_norm": (16,),
        "ffn_norm": (16,),
        "ffn_gate": (24, 16),
        "ffn_up": (24, 16),
        "ffn_down": (16, 24),
        "attn_q": (16, 16),
        "attn_k": (8, 16),
        "attn_v": (8, 16),
        "attn_output": (16, 16),
    }
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_run(flags: list[str]) -> Callable[[Path], None]:
    """Returns a function that trains in a directory."""

    def write(directory: Path) -> None:
        from blacksmith import launch

        if launch.main(["launch", *flags, *COMMON, f"--workdir={directory}"]):
            raise RuntimeError(f"{flags} does not run")

    return write


def write_adapter(directory: Path) -> None:
    """A model directory and an adapter on it, as PEFT saves it."""
    import peft
    from transformers import AutoModelForCausalLM

    (directory / "model").mkdir()
    write_model(directory / "model")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", trust_remote_code=False)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, settings).save_pretrained(directory / "adapter")


def write_gin(directory: Path) -> None:
    """A Gin file with the settings of a small run."""
    lines = [
        'Run.experiment = "keras/mnist"',
        'Run.backend = "torch"',
        "Run.seed = 3",
        'mnist.Data.source = "mnist5k"',
        "mnist.Model.hidden = (8, 4)",
        "mnist.Train.epochs = None",
        "mnist.Train.steps = 2",
        "mnist.Train.batch_size = 16",
        'Optimizer.name = "adamw"',
        "Optimizer.learning_rate = 1e-3",
        'Schedule.name = "cosine"',
    ]
    (directory / "run.gin").write_text("\n".join(lines) + "\n")


def rehash(directory: Path) -> None:
    """Makes the hashes of every checkpoint in a run directory valid."""
    from blacksmith.run import checkpoint

    for state_file in directory.glob("checkpoints/*/state.json"):
        with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError, RecursionError):
            state = json.loads(state_file.read_text())
            state.pop("state_sha256", None)
            for name in state["sha256"]:
                part = state_file.parent / name
                state["sha256"][name] = hashlib.sha256(part.read_bytes()).hexdigest()
            state["state_sha256"] = checkpoint._content_sha256(state)
            state_file.write_text(json.dumps(state))


def read_texts(path: Path) -> list[str]:
    """The flags that train on a directory of sentences."""
    return [*LLAMA, *SIZES, f'--gin_param=llama.Data.source = "{path}"']


SAMPLE = '--gin_param=mnist.Data.source = "mnist5k"'
FEW = [
    SAMPLE,
    "--gin_param=Schedule.decay_steps = 4",
    "--gin_param=mnist.Train.epochs = None",
    "--gin_param=mnist.Train.steps = 3",
]
MORE = [
    *MNIST,
    SAMPLE,
    "--gin_param=Schedule.decay_steps = 4",
    "--gin_param=mnist.Train.epochs = None",
    "--gin_param=mnist.Train.steps = 4",
]
LORA = "--gin_param=llama.Lora.rank = 2"
FORMATS = {
    "idx": Format(
        write_idx,
        lambda p: [*MNIST, '--gin_param=mnist.Data.source = "idx"', f'--gin_param=mnist.Data.path = "{p}"'],
    ),
    "gz": Format(
        write_gz,
        lambda p: [*MNIST, '--gin_param=mnist.Data.source = "idx"', f'--gin_param=mnist.Data.path = "{p}"'],
    ),
    "scene_json": Format(
        write_scene, lambda p: [*NERF, f'--gin_param=nerf.Data.scene = "{p}"'], "transforms_*.json"
    ),
    "png": Format(write_scene, lambda p: [*NERF, f'--gin_param=nerf.Data.scene = "{p}"'], "*/*.png"),
    **{
        suffix: Format(write_texts(suffix), read_texts)
        for suffix in ("csv", "tsv", "json", "jsonl", "parquet")
    },
    "model": Format(
        write_model, lambda p: [*LLAMA, LORA, f'--gin_param=llama.Model.name_or_path = "{p}"'], "*.*"
    ),
    "gguf": Format(
        write_gguf, lambda p: [*LLAMA, LORA, f'--gin_param=llama.Model.name_or_path = "{p}/model.gguf"']
    ),
    "adapter": Format(
        write_adapter,
        lambda p: [
            *LLAMA,
            LORA,
            f'--gin_param=llama.Model.name_or_path = "{p}/model"',
            f"--resume={p}/adapter",
            "--mode=eval",
        ],
        "adapter/adapter_*",
    ),
    "checkpoint": Format(write_run([*MNIST, *FEW]), lambda p: MORE, "checkpoints/*/*", run=True),
    "checkpoint_hashed": Format(
        write_run([*MNIST, *FEW]), lambda p: MORE, "checkpoints/*/*", run=True, repair=rehash
    ),
    "lightning_hashed": Format(
        write_run(NERF),
        lambda p: NERF,
        "checkpoints/*/*",
        run=True,
        repair=rehash,
    ),
    "run_files": Format(write_run([*MNIST, *FEW]), lambda p: MORE, "*.*", run=True),
    "gin": Format(write_gin, lambda p: [f"--gin_file={p}/run.gin"]),
}


# --- damage ---


def damage(content: bytes, rng: random.Random) -> bytes:
    """Returns `content` with one kind of damage."""
    kinds = [_flip, _cut, _remove, _repeat, _overwrite, _empty]
    with contextlib.suppress(UnicodeDecodeError):
        content.decode()
        kinds += [_word, _number, _line, _nest] * 3
    return rng.choice(kinds)(content, rng)


def _span(content: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + 1 + int(rng.expovariate(1 / 40)))


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        if changed:
            # Headers matter most, and they stand first.
            place = rng.randrange(min(len(changed), rng.choice([64, 1024, len(changed)])))
            changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _remove(content: bytes, rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + content[stop:]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:stop] + content[start:stop] * rng.choice([1, 2, 100]) + content[stop:]


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    start, stop = _span(content, rng)
    return content[:start] + rng.randbytes(stop - start) + content[stop:]


def _empty(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\0", b"null", b"[]", b"{}", b"\xff\xfe", b"\n" * 1000])


def _replace_one(pattern: str, content: bytes, rng: random.Random, by: list[str]) -> bytes:
    text = content.decode()
    found = list(re.finditer(pattern, text))
    if not found:
        return content
    match = rng.choice(found)
    return (text[: match.start()] + rng.choice(by) + text[match.end() :]).encode()


def _word(content: bytes, rng: random.Random) -> bytes:
    words = [
        "",
        "x",
        "null",
        "true",
        "../../x",
        "/etc/passwd",
        "\\u0000",
        "é" * 300,
        "NaN",
        "__import__",
        "\x1b[31m",
    ]
    return _replace_one(r"[A-Za-z_][\w./-]*", content, rng, words)


def _number(content: bytes, rng: random.Random) -> bytes:
    numbers = [
        "0",
        "-1",
        "1e999",
        "NaN",
        "99999999999999999999",
        "2147483648",
        "1.5",
        '"7"',
        "null",
        "[1]",
        "1e-300",
    ]
    return _replace_one(r"-?\d+(\.\d+)?([eE][-+]?\d+)?", content, rng, numbers)


def _line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True) or [b""]
    place = rng.randrange(len(lines))
    lines[place] = rng.choice([b"", lines[place] * 2, rng.choice(lines), b"{\n", b"\t,;\"'\n"])
    return b"".join(lines)


def _nest(content: bytes, rng: random.Random) -> bytes:
    """Puts a list that is 100,000 levels deep in the place of a number."""
    return _replace_one(r"\d+", content, rng, ["[" * 100_000 + "]" * 100_000])


# --- running ---


def torture(directory: Path, mutants: int, seed: int, workers: int) -> dict[str, dict]:
    """Runs mutants of all formats, `mutants` in all; returns what was counted for each format."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
        KERAS_BACKEND="torch",
        BLACKSMITH_CACHE=str(directory / "cache"),
        HF_HUB_OFFLINE="1",
    )
    _import_everything()
    share = -(-mutants // len(FORMATS))
    bases = {}
    for name, form in FORMATS.items():
        bases[name] = directory / name / "valid"
        bases[name].mkdir(parents=True)
        _Fork(
            lambda form=form, base=bases[name]: form.write(base) or 0, directory / name / "write.txt"
        ).wait()
        first = directory / name / "first"
        shutil.copytree(bases[name], first / "input")
        _reading(form, first / "input", first / ("input" if form.run else "run")).wait()
    # Forks are started from one thread alone: a fork copies the locks of the other threads as they stand.
    rows = {
        name: {
            "mutants": share,
            "refused": 0,
            "tracebacks": 0,
            "hangs": 0,
            "partial_directories": 0,
            "failures": [],
        }
        for name in FORMATS
    }
    waiting = [(name, i) for name in FORMATS for i in range(share)]
    running: list[_Mutant] = []
    while waiting or running:
        while waiting and len(running) < workers:
            name, i = waiting.pop(0)
            running.append(_Mutant(name, bases[name], directory / name / str(i), f"{name} {i} {seed}"))
        for mutant in [m for m in running if m.fork.ended()]:
            running.remove(mutant)
            kind, message = mutant.judge()
            if kind != "accepted":
                rows[mutant.name][kind] += 1
            if kind not in ("accepted", "refused"):
                rows[mutant.name]["failures"].append(f"{kind}: {message}")
        time.sleep(0.005)
    return rows


class _Mutant:
    """A damaged copy of a valid input, and the process that reads it."""

    def __init__(self, name: str, base: Path, directory: Path, seed: str) -> None:
        self.name, self.seed, self.directory = name, seed, directory
        self.form, rng = FORMATS[name], random.Random(seed)
        copy = directory / "input"
        shutil.copytree(base, copy)
        path = rng.choice(sorted(p for p in copy.glob(self.form.files) if p.is_file()))
        path.write_bytes(damage(path.read_bytes(), rng))
        if self.form.repair:
            self.form.repair(copy)
        self.path = path.relative_to(copy)
        self.run = copy if self.form.run else directory / "run"
        self.fork = _reading(self.form, copy, self.run)

    def judge(self) -> tuple[str, str]:
        """What came of it, and details."""
        status, output = self.fork.status, self.fork.printed()
        message = f"{self.path}, seed {self.seed!r}, status {status}: {output[-1500:]}"
        if status is None:
            return "hangs", message
        if status not in (0, 1, 2, 3) or "Traceback" in output or (status and "error: " not in output):
            return "tracebacks", message
        if status in (2, 3) and not self.form.run and self.run.exists():
            return "partial_directories", message
        shutil.rmtree(self.directory, ignore_errors=True)
        return ("refused" if status else "accepted"), message


def _reading(form: Format, source: Path, run: Path) -> "_Fork":
    """Starts the launcher on an input."""
    from blacksmith import launch

    flags = [*form.command(source), *COMMON, f"--workdir={run}"]
    return _Fork(lambda: launch.main(["launch", *flags]), source.parent / "output.txt")


def _import_everything() -> None:
    import av  # noqa: F401
    import datasets  # noqa: F401
    import keras  # noqa: F401
    import lightning  # noqa: F401
    import peft  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)


class _Fork:
    """A fork of this process that runs `body` and exits with what it returns; its output goes to a file."""

    def __init__(self, body: Callable[[], int], output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output, self.status = output, None
        self._deadline = time.monotonic() + SECONDS
        self._process = os.fork()
        if not self._process:
            self._child(body)

    def _child(self, body: Callable[[], int]) -> None:
        status = 70
        try:
            stream = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(stream, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            status = body()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def ended(self) -> bool:
        """Whether it has ended, or was killed for taking too long; `status` is None then."""
        found, status = os.waitpid(self._process, os.WNOHANG)
        if found:
            self.status = os.waitstatus_to_exitcode(status)
            return True
        if time.monotonic() < self._deadline:
            return False
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        return True

    def wait(self) -> None:
        """Waits for its end; raises `RuntimeError` with what it printed if its status is not 0."""
        while not self.ended():
            time.sleep(0.005)
        if self.status:
            raise RuntimeError(f"{self.output}: {self.printed()}")

    def printed(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""
