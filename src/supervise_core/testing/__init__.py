"""Fakes, faults and conformance suites, for our tests and for those of plugin authors. Nothing else imports this."""
