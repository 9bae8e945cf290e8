"""X-SAM in other libraries' trainers, one module a library, imported only by name."""
