"""Corpora: sources of documents, and the token shards that trainers read."""
