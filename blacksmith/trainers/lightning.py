"""Lightning's Trainer for experiments in which the run handles metrics, checkpoints and the console."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch


def make_trainer(device: str, directory: Path, **options: Any) -> L.Trainer:
    """Lightning's Trainer on one device, without its own logger, checkpoints, summary and progress bar.

    Silences Lightning's hints for this process: it recommends data loader workers and a logger, but the data
    is on the device already and the run writes the metrics.

    Args:
      device: a torch device by name, such as ``cpu`` or ``cuda:1``.
      directory: where Lightning writes if it has to.
      **options: of `L.Trainer`; they take precedence.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    kind, index = torch.device(device).type, torch.device(device).index
    defaults = {
        "accelerator": kind if kind in ("cpu", "mps") else "gpu",
        "devices": 1 if index is None else [index],
        "default_root_dir": directory,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return L.Trainer(**(defaults | options))
