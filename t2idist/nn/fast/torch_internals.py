"""torch's private names that this package uses: the only file that names them.

A new version of torch starts here: the test suite passed on each of `CHECKED_VERSIONS`, between which none of these
differs, and tests/nn/test_torch_internals.py checks that we call them as they are.
"""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase  # base of BatchNorm1d to 3d; there is no public one
from torch.nn.modules.dropout import _DropoutNd as DropoutBase  # base of every dropout
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase  # base of InstanceNorm1d to 3d
from torch.utils._python_dispatch import TorchDispatchMode  # sees every operation of a step
from torch.utils._pytree import tree_leaves, tree_map_only  # tensors in nested arguments

__all__ = [
    "BatchNormBase",
    "DropoutBase",
    "InstanceNormBase",
    "TorchDispatchMode",
    "end_allocate_to_pool",
    "foreach_add",
    "foreach_add_",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul_",
    "foreach_norm",
    "release_pool",
    "softmax",
    "softmax_backward",
    "tree_leaves",
    "tree_map_only",
]

CHECKED_VERSIONS = ("2.13", "2.14")

# one operation for a list of tensors
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
# after a recording of a CUDA graph that failed
end_allocate_to_pool = torch._C._cuda_endAllocateToPool
release_pool = torch._C._cuda_releasePool
# torch.softmax and its gradient with out=
softmax = torch._softmax
softmax_backward = torch._softmax_backward_data
