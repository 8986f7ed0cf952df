"""How decode kernels divide their work: heads by group, programs by multiprocessor."""

# G heads of a group, padded to a power of two
from collections.abc import Sequence

import torch

# Shared memory that a program may have, by compute capability (CUDA C++ programming guide, "Technical Specifications"), and what
# products and reductions use of it beside the pipelines.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
OTHER_BYTES = 31 << 10


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def padded_width(width: int) -> int:
    """The power of two that holds a width of a matrix product, which has at least 16 columns."""
    return max(16, next_power_of_2(width))


def pipeline_bytes_of(device: torch.device) -> int:
    """Shared memory for the pipelines of a program that has a multiprocessor for itself; without a GPU that of Hopper."""
    if device.type != "cuda":
        return SHARED_BYTES[90] - OTHER_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - OTHER_BYTES


def stages_that_fit(wanted: int, step_bytes: int, total_bytes: int, *, held_steps: int = 0) -> int:
    """Stages of a software pipeline, at least 1: stages - 1 steps are in shared memory at once, and held_steps whose products read it."""
    return max(1, min(wanted, 1 - held_steps + total_bytes // step_bytes))


def group_heads(group_H: Sequence[int], num_groups: int, *, at_least: int = 1) -> torch.Tensor:
    """Table int64 [num_groups, G]: the heads of every group in order, padded with -1 to a common power of two."""
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for head, group in enumerate(group_H):
        members[group].append(head)
    width = next_power_of_2(max(at_least, *(len(heads) for heads in members)))
    return torch.tensor([heads + [-1] * (width - len(heads)) for heads in members])


def num_processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 on a CPU, where the interpreter runs one program after the other.

    On the meta device, where launches are described to be compiled for GPUs of any size, 7: what is computed from it is then no multiple
    of 16 by chance, which a kernel would be compiled for.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 7 if device.type == "meta" else 8


def max_waiting(num_groups: int, num_processors: int) -> int:
    """How many programs of each of num_groups counters may wait for the rest of their group without ever stopping it.

    Only the very last program of a group waits for nobody, so num_groups * (result - 1) programs wait at most. Every
    multiprocessor holds at least one program: with the waiting ones on fewer than half of them, the others always get a
    place, also when two such launches overlap.
    """
    return 1 + max(0, num_processors // 2 - 1) // num_groups
