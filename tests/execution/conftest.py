import pytest
from rectiflow.tests.execution.toy_nodes import ToyHost


@pytest.fixture
def toy() -> ToyHost:
    return ToyHost()
