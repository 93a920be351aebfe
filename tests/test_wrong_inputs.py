import pytest

from tests import wrong_inputs


@pytest.fixture(scope='module')
def page():
  return wrong_inputs.PAGE.read_text().splitlines()


@pytest.mark.parametrize('case', wrong_inputs.CASES, ids=lambda case: case.what.replace(' ', '-'))
def test_one_line_says_what_to_change_as_on_the_page(case, page):
  code, text = wrong_inputs.answer(case)
  assert text.startswith({2: 'error: ', 1: 'failed: '}[code]), text
  assert text.count('\n') == 1 and 'Traceback' not in text
  assert any(word in text for word in ('set ', 'see --help', 'remove ', 'put them after', 'wait'))
  assert wrong_inputs.row(case, code, text) in page


def test_the_page_shows_these_cases_and_no_others(page):
  assert len(wrong_inputs.CASES) >= 40
  assert sum(line.startswith('| ') for line in page) == len(wrong_inputs.CASES) + 1
