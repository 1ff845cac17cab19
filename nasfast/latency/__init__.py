"""Latency of networks on a target: measured as they are deployed, and predicted from a table of
operators."""

from nasfast.latency.meter import PROFILE, Latencies, UndeployableError
from nasfast.latency.profile import Profile, measured_profile, write_bundle
from nasfast.latency.timing import Backend, Target

__all__ = [
    "PROFILE",
    "Backend",
    "Latencies",
    "Profile",
    "Target",
    "UndeployableError",
    "measured_profile",
    "write_bundle",
]
