"""Serving: many tenants, many adapters of any method, one base. Files are in the order of a request's way."""
