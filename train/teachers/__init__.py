"""Stage 1's parts: what is asked about a shard, who answers, and the journal of the answers."""
