"""The head of a module: find it, read, write and feed it, fit it; or graft one."""
