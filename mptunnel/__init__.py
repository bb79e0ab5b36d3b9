"""mptunnel: a redundant multipath tunnel for Linux. Every packet goes over every path; the first copy wins."""

__version__ = "0.1.0"
