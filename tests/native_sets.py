"""The native kernels that this machine has, one an instruction set, for the tests of them."""

import pytest

from llmcompress.quantization.kernels import native

HERE = []
for name in native.SETS:
    try:
        HERE.append(native.load(name))
    except native.NotBuilt:
        continue
built = pytest.mark.skipif(not HERE, reason="native kernels are not built: no C++ compiler at installation")
