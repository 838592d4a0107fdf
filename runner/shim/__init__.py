"""Fork server and shim: stdlib only, C-level imports, no asyncio. Contract: docs/shim.md."""
