import pytest


def pytest_addoption(parser):
    parser.addoption("--heavy", action="store_true", help="compiled graphs, models: minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "heavy: only with --heavy")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--heavy"):
        for item in items:
            if "heavy" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --heavy"))
