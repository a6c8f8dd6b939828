"""Softmax attention: the reference against its mathematics, the chunked form against the reference."""

from hypothesis import given

from tests.kernels import attention_cases
from tests.kernels.attention_cases import Case


@given(attention_cases.cases())
def test_chunked_equals_reference(case: Case):
    attention_cases.assert_equals_reference(case, "chunked")
