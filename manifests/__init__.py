"""The contract between converter, runtime and plugins: head roles, plans and architecture facts. Imports no torch."""
