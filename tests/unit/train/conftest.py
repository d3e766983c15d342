import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    # Tiny products are slower on two threads, and a resumed run compares the number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
