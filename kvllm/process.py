"""How a process that is kvllm's own, as the command line and the benchmarks, sets up the libraries below torch.

prepare_libraries()     # before torch is imported
"""

from __future__ import annotations

import os

from kvllm import memory


def prepare_libraries() -> None:
    """Set what OpenMP and the C library read before torch is loaded; a user's own settings stay."""
    # Idle OpenMP threads spin by default. With one other busy process on the machine, every small operation then waits
    # for the scheduler: a training of 15 s was measured to take 125 s. Threads that sleep at once cost a fifth of the
    # speed on a free machine; some microseconds of spinning (libgomp's count) bridge the gaps between operations.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Every shape of a matrix product is a compiled kernel, and each step of a training has shapes of its own: the usual
    # 1,024 of them are 0.4 GiB that nobody asks for again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # What torch has no Metal kernel for runs on the CPU: in peft's allocation of ranks kthvalue, for some versions.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    memory.keep_large_tensors_out_of_the_heap()
