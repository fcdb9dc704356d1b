"""The sweep over arrays that are sharded over a mesh of devices."""
