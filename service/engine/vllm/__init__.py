"""Everything that knows vLLM: its engine in this process, and our drafting inside its worker."""
