"""Lightning's Trainer as the experiments build it: on the given device, and silent."""

import signal
import subprocess
import sys

import lightning as L
import torch

from blacksmith.trainers.lightning import make_trainer

# In a process of its own, where warnings and log lines go to the console as they do for a user.
FIT = """
import lightning as L
import torch
from blacksmith.trainers.lightning import make_trainer

class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(()))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def training_step(self, batch):
        return (self.slope * batch - 2 * batch).square().mean()

line = Line()
make_trainer("cpu", ".", max_epochs=20).fit(line, torch.utils.data.DataLoader(torch.ones(4)))
print(line.slope.device, round(line.slope.item(), 4))
"""


def test_training_prints_and_writes_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", FIT], cwd=tmp_path, capture_output=True, text=True)
    # 80 steps at a rate of 0.1 on a quadratic leave 0.8 ** 80 of the error.
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu 2.0\n", "")
    assert list(tmp_path.iterdir()) == []


def test_options_take_precedence(tmp_path):
    trainer = make_trainer("cpu", tmp_path, enable_progress_bar=True, max_steps=7)
    assert trainer.progress_bar_callback is not None
    assert trainer.max_steps == 7
    assert make_trainer("cpu", tmp_path).progress_bar_callback is None


def test_signals_stay_with_the_run(tmp_path, monkeypatch):
    """From the first hook to the last: Lightning's own handler raises between two of them."""
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    numbers, seen = (signal.SIGTERM, signal.SIGUSR1), []

    class Watching(L.LightningModule):
        def setup(self, stage):
            seen.append([signal.getsignal(number) for number in numbers])

        def configure_optimizers(self):
            return None

        def training_step(self, batch):
            seen.append([signal.getsignal(number) for number in numbers])

    before = [signal.getsignal(number) for number in numbers]
    make_trainer("cpu", tmp_path, max_steps=1, max_epochs=1).fit(
        Watching(), torch.utils.data.DataLoader(torch.ones(1))
    )
    assert seen == [before, before]
