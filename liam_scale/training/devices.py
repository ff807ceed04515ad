"""Which device a process computes on, and the line that says so."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

Device = Literal["auto", "cpu", "cuda"]

NVIDIA = Path("/dev/nvidia0")
"""There where the machine has an NVIDIA GPU and its driver is loaded, whatever torch makes of it."""

DRIVER = Path("/proc/driver/nvidia/version")


def check_device(device: Device) -> None:
    """Refuse a device that is not there, and to go without one that torch cannot see.

    Raises
    ------
    ValueError
        Says what to install, or what else to ask for.
    """
    if device == "cpu" or gpu() is not None:
        return
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles")
    if NVIDIA.exists() and not is_hidden:
        raise ValueError(
            f"--device: got {device}, but torch sees none of the NVIDIA GPUs of this machine: {_unseen()}; or use "
            "--device cpu"
        )
    if device == "cuda":
        raise ValueError("--device: got cuda, but torch sees no CUDA device here; use --device cpu or auto")


def _unseen() -> str:
    """Why torch does not see a GPU that is there, and what helps."""
    index = "https://download.pytorch.org/whl/cu126"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; pip install torch --index-url {index}"
    driver = DRIVER.read_text().splitlines()[0].strip() if DRIVER.exists() else "of an unknown version"
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, the driver is {driver} (CUDA 13 needs 580 "
        f"or later, CUDA 12.6 needs 525); update the driver, or pip install torch --index-url {index}"
    )


def gpu() -> torch.device | None:
    """The GPU of this process, None without any: the only one it sees, else that of its place on the machine.

    Raises
    ------
    ValueError
        There are fewer GPUs than processes on this machine.
    """
    if not torch.cuda.is_available():
        return None
    visible, place = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    # A launcher that shows every process its own GPU (srun --gpus-per-task=1) shows it one.
    if visible > 1 and place >= visible:
        raise ValueError(
            f"ranks: this process is number {place} of its machine (LOCAL_RANK, counted from 0), where torch sees "
            f"{visible} GPUs; start at most {visible} processes a machine, or use --device cpu"
        )
    return torch.device("cuda", 0 if visible == 1 else place)


def device_of(device: Device) -> torch.device:
    """The device of this process.

    Raises
    ------
    ValueError
        As `check_device`.
    """
    check_device(device)
    chosen = None if device == "cpu" else gpu()
    if chosen is None:
        return torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def name_of(device: torch.device) -> str:
    """As a first line names it: `cuda:0 NVIDIA H100`, `cpu, 2 threads`."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else str(device)
