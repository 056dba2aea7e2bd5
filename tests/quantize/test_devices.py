"""The arithmetic is the format's on every device: the reference on CUDA against the reference on the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch

from mxconv.quantize import packing, reference
from tests.quantize.schemes import CASE_NAMES, CASES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme, projection", CASES, ids=CASE_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_gives_the_bits_of_the_cpu(scheme, projection, dtype):
    make = torch.Generator().manual_seed(11)
    sizes = torch.logspace(-36, 30, 512)[:, None]  # down to subnormal results
    w = (torch.randn(512, 1024, generator=make) * sizes).to(dtype)
    w[128:256, :128] = 0
    here = reference.encode(w, scheme, projection)
    there = reference.encode(w.cuda(), scheme, projection)
    assert torch.equal(there.codes.cpu(), here.codes)
    assert torch.equal(there.scale.cpu().view(torch.int32), here.scale.view(torch.int32))
    assert torch.equal(packing.store_codes(there.codes, scheme).cpu(), packing.store_codes(here.codes, scheme))
    back = reference.decode(there, scheme, projection).cpu()
    assert torch.equal(back.view(torch.int32), reference.decode(here, scheme, projection).view(torch.int32))
