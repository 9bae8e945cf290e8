"""X-SAM's step inside a `Trainer`: running it again, what it must not leave behind, and what it cannot work with."""
