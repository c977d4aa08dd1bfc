"""One batch, many methods: each row under a method of its own."""
