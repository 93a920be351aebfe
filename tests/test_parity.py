import pytest

from tests import parity


@pytest.mark.parametrize('case', [
    pytest.param(name, marks=[pytest.mark.slow] if slow else [])
    for name, (_, slow) in parity.CASES.items()])
def test_equals_the_published_implementation(case):
  compare, _ = parity.CASES[case]
  deviations = compare()
  assert deviations
  too_far = [d for d in deviations if not d.largest <= d.tolerance]
  assert not too_far
