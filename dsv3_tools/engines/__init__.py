"""What serving engines accept: data about each, and rules that tell what it would refuse or misread.

The rules know names, specs and `config.json`, so that a conversion can ask before a byte is written.
"""

from __future__ import annotations

from dsv3_tools.engines.data import ENGINES
from dsv3_tools.engines.engine import FORMATS, Engine, Support
from dsv3_tools.engines.matching import Matcher, is_ignored
from dsv3_tools.engines.model import ModelView
from dsv3_tools.engines.problems import Problem
from dsv3_tools.engines.rules import Verdict, verdict, verdicts

__all__ = [
    "ENGINES",
    "FORMATS",
    "Engine",
    "Matcher",
    "ModelView",
    "Problem",
    "Support",
    "Verdict",
    "is_ignored",
    "verdict",
    "verdicts",
]
