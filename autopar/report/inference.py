"""Rates of plans for inference, in words."""

from __future__ import annotations

from autopar.ir.inference import rates_of
from autopar.ir.plan import Plan
from autopar.ir.quantity import Quantity
from autopar.units import format_joules


def rate_words(plan: Plan) -> list[tuple[str, str]]:
    """(name, words) of lines of a report: throughput, and joules of a sample and of a token."""
    rates = rates_of(plan)
    own = [shown_rate(rate) for rate in (rates.samples_per_s, rates.tokens_per_s) if rate is not None]
    found = [("Throughput", f"{', '.join(own)}, one batch after another ({rates.samples_per_s.label})")]
    if len(plan.predicted.stages) > 1:
        full = rates.full_samples_per_s
        found.append(("", f"{shown_rate(full)} with the pipeline kept full ({full.label})"))
    joules = f"{format_joules(rates.j_per_sample.value)} per sample"
    if rates.j_per_token is not None:
        joules += f", {format_joules(rates.j_per_token.value)} per token"
    return [*found, ("", f"{joules}, one batch after another ({rates.j_per_sample.label})")]


def shown_rate(rate: Quantity) -> str:
    """`12.3 samples/s`, with separators where it is large."""
    return f"{rate.value:,.0f} {rate.unit}" if rate.value >= 1e4 else f"{rate.value:.4g} {rate.unit}"
