"""A head in a module: find it, read, write and feed it, fit it, graft one."""
