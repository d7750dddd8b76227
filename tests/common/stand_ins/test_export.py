"""Stand-in: the export tests are not in the sdist."""


class ExportTesterMixin:
    """Has no tests."""
