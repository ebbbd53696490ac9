"""Whether tensors that should be copies of each other are: compared before the first byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dsv3_tools.checkpoint.dtypes import DTYPES
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.plan import TensorRef
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import CheckpointError, join_problems

__all__ = ["check_identical"]

_CHUNK_NBYTES = 4 << 20


def check_identical(
    pairs: Sequence[tuple[TensorRef, TensorRef]], checkpoints: Mapping[str, Checkpoint], stop: Stop
) -> None:
    """Refuses tensors that are not, bit for bit, the others that they are said to repeat.

    Raises:
        CheckpointError: every pair that differs, with the first element and how many there are.
        Interrupted: somebody has asked `stop`.
    """
    if not pairs:
        return

    def compare(pair: tuple[TensorRef, TensorRef]) -> str | None:
        return _difference(*pair, checkpoints, stop)

    with ThreadPoolExecutor(8) as pool:
        problems = [found for found in pool.map(compare, pairs) if found is not None]
    if problems:
        raise CheckpointError(
            f"{join_problems(problems)}: drafts share these with the model, so the MTP module is of another "
            "model, or one of the two was trained since; --allow-different-shared goes on"
        )


def _difference(
    copy: TensorRef, original: TensorRef, checkpoints: Mapping[str, Checkpoint], stop: Stop
) -> str | None:
    ours, theirs = checkpoints[copy.origin], checkpoints[original.origin]
    spec, other = ours.specs[copy.name], theirs.specs[original.name]
    what = f"{ours.source}: {copy.name} is not {original.name} of {theirs.source}"
    if spec != other:
        return f"{what}: it is {spec}, that is {other}"
    buffers = [memoryview(bytearray(min(_CHUNK_NBYTES, spec.nbytes))) for _ in range(2)]
    width, count, first = DTYPES[spec.dtype].bits // 8, 0, 0
    for start in range(0, spec.nbytes, _CHUNK_NBYTES):
        stop.check()
        left, right = (buffer[: min(_CHUNK_NBYTES, spec.nbytes - start)] for buffer in buffers)
        ours.read_into(copy.name, start, left)
        theirs.read_into(original.name, start, right)
        unequal = np.frombuffer(left, np.uint8) != np.frombuffer(right, np.uint8)
        if not unequal.any():
            continue
        elements = unequal.reshape(-1, width).any(axis=1)
        if not count:
            first = start // width + int(np.argmax(elements))
        count += int(elements.sum())
    if not count:
        return None
    place = ", ".join(str(int(i)) for i in np.unravel_index(first, spec.shape))
    return f"{what}: {count:,} of {spec.num_elements:,} elements differ, the first at [{place}]"
