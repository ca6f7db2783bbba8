import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models spend their time waking threads; where threads matter, a test sets their number itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
