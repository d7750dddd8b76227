"""How the scripts print their help: every option with its default."""

import argparse


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" where the text does not say it; a switch is off by default.

    An option without a value by default says in its own words what happens then: a test looks.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or action.required or "default" in text:
            return text
        if action.default is False and action.nargs == 0:
            return f"{text} (default: off)"
        return super()._get_help_string(action)


class ShowDefaultsAndLines(ShowDefaults, argparse.RawDescriptionHelpFormatter):
    """The same, with the lines of the description as they are."""
