"""Everything that knows vLLM: its engine in the service's process, and our drafting inside its worker."""
