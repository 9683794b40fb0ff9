"""The parts of `fleet.tenants`: what tenants own, how it is computed with, where it is held."""
