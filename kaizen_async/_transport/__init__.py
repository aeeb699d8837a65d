"""One HTTP attempt: bytes out, bytes in, and what the bytes mean."""
