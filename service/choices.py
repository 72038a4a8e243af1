"""The words that a request may use: one list for the service, and for the command line, which goes without pydantic."""

from typing import Literal

Effort = Literal["smoke", "quick", "standard", "paper"]
Method = Literal["metapruning", "collaborative", "magnitude", "interspace"]
Objective = Literal["best", "front"]
Strategy = Literal["evolution", "random"]
LastLayer = Literal["free", "fixed"]
