"""Lightning's Trainer for experiments in which the run handles metrics, checkpoints and the console."""

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch


def make_trainer(device: str, directory: Path, **options: Any) -> L.Trainer:
    """Lightning's Trainer on one device, such as ``cuda:1``, without logger, checkpoints and progress bar.

    `options` of `L.Trainer` take precedence; Lightning writes into `directory` if it has to.
    """
    # Lightning recommends data loader workers and a logger, which a run does not need.
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
    trainer = L.Trainer(**(defaults | options))
    # The run handles signals. Lightning's handler would end it between two hooks, and requeue a Slurm job.
    trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer
