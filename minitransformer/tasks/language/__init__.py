"""Tasks for a language model that talks: text in, text out, whatever the tokenizer."""
