"""Stand-in: the generation tests are not in the sdist; our own `tests/test_generation.py` covers their ground."""


class GenerationTesterMixin:
    """Has no tests."""
