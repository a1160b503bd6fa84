"""Chat completions from any OpenAI-compatible endpoint: bounded, within a budget, and never asked for twice.

Endpoint.ask    store: an answer that was kept is taken from there             (`store`)
                limits: its turn, a free place, requests and tokens a minute   (`limits`)
                wire: one HTTP request, and what its answer says               (`wire`)
                tries, hedging, budget                                         (`client`)
"""

from __future__ import annotations

from negotiator.endpoint.client import Endpoint
from negotiator.endpoint.records import BudgetSpent, EndpointStats, Request, Unanswered

__all__ = ["BudgetSpent", "Endpoint", "EndpointStats", "Request", "Unanswered"]
