"""Backends, which have the choices that depend on the platform, and hints on fusion to compilers."""
