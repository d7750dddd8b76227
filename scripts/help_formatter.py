"""How the scripts print their help: every option with its default."""

import argparse


class ShowDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" where there is a default and the text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text:
            return text
        return super()._get_help_string(action)
