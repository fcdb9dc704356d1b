"""The sweep (a loop over blocks of positions) over arrays that are sharded over a mesh of devices."""
