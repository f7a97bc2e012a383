"""Building corpora: the passes of a build, one machine or many, and the shards they write."""
