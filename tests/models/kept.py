"""What autograd keeps between forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_for_backward(module: nn.Module, run: Callable[[], Tensor]) -> tuple[list[int], Tensor]:
    """Bytes of the storages kept by `run`, the largest first, and its result; parameters and
    buffers of the module are not counted."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that no other one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sorted((storage.nbytes() for storage in kept.values()), reverse=True), result
