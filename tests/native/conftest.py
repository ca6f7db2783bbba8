"""The option of ``make sanitize``."""


def pytest_addoption(parser):
    parser.addoption("--everything", action="store_true", help="call the host kernels on all sizes, and look for races")
