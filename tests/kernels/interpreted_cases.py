"""The list of kernel_cases.py at small size under Triton's interpreter. Run by test_kernel_interpreted.py."""

import pytest
from kernel_cases import SMALL, all_cases, error_of
from tokenflex_kernels import target

CASES = list(all_cases(SMALL, "cpu"))


@pytest.mark.parametrize("kernel", sorted({case.kernel for case in CASES}))
def test_every_case_is_right(kernel):
    assert target.is_interpreted()
    wrong = {case[1:3]: error for case in CASES if case.kernel == kernel and (error := error_of(case))}
    assert not wrong


def test_the_list_has_every_configuration():
    """Of this path, and the pointers' beside it; a fault planted in a case is found."""
    kernels = {case.kernel for case in CASES}
    assert kernels == {"pool", "gated", "dgated", "pooled_gated", "norm_grad", "weight_grads", "splice"}
    assert {case.pattern.split()[0] for case in CASES if case.kernel == "gated"} == {"T=1", "T=50"}
    case = next(case for case in CASES if case.kernel == "gated")
    what, got, exact, roundings = case.run()[0]
    got[-1, -1] += 1
    assert error_of(case._replace(run=lambda: [(what, got, exact, roundings)]))
