"""Latency of networks on a target: measured as they are deployed, and predicted from a table of
operators."""

from nasfast.latency.meter import Latencies
from nasfast.latency.profile import Profile, measured_profile, write_bundle
from nasfast.latency.timing import Backend, Target

__all__ = ["Backend", "Latencies", "Profile", "Target", "measured_profile", "write_bundle"]
