"""What every test can rely on.

One thread per process, and seeds that depend on nothing but the test. Variables, set here before torch is imported
and inherited by the processes that tests start:

    OMP_NUM_THREADS, MKL_NUM_THREADS   1          results and times do not depend on the load
    TOKENIZERS_PARALLELISM             false      no threads before a fork
    HF_HUB_OFFLINE, WANDB_MODE         1, offline no test touches the network
    MPLBACKEND                         Agg        plots without a display
    NOVA_KERNELS_BACKEND               (removed)  tests see each op's own choice of backend
    TRITON_INTERPRET                   1          without a GPU, Triton kernels run interpreted (set before triton is)

Read by tests, never set here: NOVA_DATA, a folder with the real data sets; tests of them are skipped without it.
"""

from __future__ import annotations

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    MPLBACKEND="Agg",
)
os.environ.pop("NOVA_KERNELS_BACKEND", None)

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
torch.set_num_interop_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("nova", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("nova")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed the global generators before each test; put back process-wide torch settings that a test changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on several ranks come first: started once, in one worker, and not in all of them at once."""
    items.sort(key=lambda item: not hasattr(getattr(item, "module", None), "on_ranks"))
